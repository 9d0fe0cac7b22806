"""The server as an application of Ray Serve: one deployment for HTTP, one for the model, each with its replicas.

`serve run modeling_qzoom.serving.deployment:build_app model=FOLDER` starts it; `serve.yaml` beside this file is for
`serve deploy` on a cluster.
"""

from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig

from .app import build_api
from .config import ServeConfig
from .replicas import Replica, ReplicaEngine


HTTP, MODEL = "Http", "Model"
# processor share of an HTTP replica, which waits most of the time
_HTTP_CPUS = 0.1
_RETRY_SECONDS = 2.0
_MOST_HTTP = 4096  # requests that an HTTP replica holds at once


class HttpReplica:
    """Takes requests and sends their prompts to the model's replicas.

    Args:
        options: those of `ServeConfig`, by name.
        model: handle of the model's deployment.
    """

    def __init__(self, options: dict[str, Any], model: Any) -> None:
        config = ServeConfig(**options)
        self._app = build_api(config, ReplicaEngine(model, config.request_seconds))

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def drain(self) -> int:
        """Refuses new requests from now on; returns how many are still being answered."""
        api = self._app.state.api
        api.is_draining = True
        return api.in_flight


def _environment(config: ServeConfig) -> dict[str, Any]:
    """What replicas get of this process's environment: the key that it names."""
    key = config.api_key()
    return {} if key is None else {"runtime_env": {"env_vars": {str(config.api_key_variable): key}}}


def _gpus(config: ServeConfig) -> float:
    if config.gpus is not None:
        return config.gpus
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def most_requests(config: ServeConfig) -> int:
    """Requests that a replica of the model may hold: the batch that runs, the next one, and its queue."""
    return config.queue_rows + 2 * config.batch_rows


def build_app(config: ServeConfig) -> Any:
    """The application, for `serve.run` or `serve run modeling_qzoom.serving.deployment:build_app model=FOLDER`.

    Args:
        config: options of the server.

    Raises:
        ValueError: the variable that should hold the API key is not set.
    """
    options = config.model_dump()
    model = serve.deployment(Replica).options(
        name=MODEL,
        num_replicas=config.replicas,
        max_ongoing_requests=most_requests(config),
        max_queued_requests=config.queue_rows,
        graceful_shutdown_timeout_s=config.request_seconds,
        health_check_period_s=5,
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_gpus": _gpus(config), "num_cpus": 1},
    )
    http = serve.deployment(serve.ingress()(HttpReplica)).options(
        name=HTTP,
        max_ongoing_requests=_MOST_HTTP,
        max_queued_requests=_MOST_HTTP,
        backpressure_config=BackpressureConfig(retry_after_s=_RETRY_SECONDS),
        graceful_shutdown_timeout_s=config.request_seconds,
        ray_actor_options={"num_cpus": _HTTP_CPUS, **_environment(config)},
    )
    return http.bind(options, model.bind(options))
