"""A server from its start to its end: on Ray, or in this process."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import uvicorn
from ray import serve

from .app import build_api
from .config import ServeConfig
from .deployment import build_app
from .worker import Worker


logger = logging.getLogger(__name__)

_APPLICATION = "qzoom"
_POLL_SECONDS = 0.2


def serve_in_process(config: ServeConfig, host: str, port: int) -> None:
    """Serves one model from this process until a signal ends it.

    Args:
        config: options of the server.
        host, port: where to listen.
    """
    worker = Worker.open(config)
    logger.info("%s at http://%s:%d/v1", config.name, host, port)
    seconds = int(config.request_seconds) + 1
    with _until_signal():  # uvicorn raises the signal again once it has ended, which would kill us
        uvicorn.run(build_api(config, worker), host=host, port=port, timeout_graceful_shutdown=seconds)
    worker.queue.end()


@contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of what they did before."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_ray(config: ServeConfig) -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        return
    # Ray counts a processor for each replica; that it has no more must not keep any from starting
    cpus = max(os.cpu_count() or 1, config.replicas + 1)
    ray.init(num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1")


def drain(handle: Any, seconds: float) -> None:
    """Has the HTTP replicas refuse new requests, and returns when those under way have ended.

    Args:
        handle: of the application.
        seconds: most that is waited.
    """
    deadline = time.monotonic() + seconds
    while sum(handle.broadcast("drain").results()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def serve_on_ray(config: ServeConfig, host: str, port: int) -> None:
    """Serves the model's replicas on Ray Serve until a signal ends it.

    Args:
        config: options of the server.
        host, port: where to listen.

    Raises:
        RuntimeError: the replicas could not be started; their log says why.
    """
    _start_ray(config)
    try:
        serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        with _until_signal() as ended:
            handle = serve.run(build_app(config), name=_APPLICATION)
            logger.info("%s at http://%s:%d/v1, %d replicas", config.name, host, port, config.replicas)
            ended.wait()
            logger.info("ending: what was accepted is answered, nothing new is taken")
            drain(handle, config.request_seconds)
    finally:
        serve.shutdown()
        ray.shutdown()
