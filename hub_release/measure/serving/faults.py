"""What may happen to a server: a replica is killed, clients leave, it is told to end while it answers."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from huggingface_hub.utils import httpx

from hub_release.measure.serving.load import load
from hub_release.measure.serving.questions import Asked
from hub_release.measure.serving.server import Server


def with_a_killed_replica(server: Server, asked: Sequence[Asked], concurrency: int) -> dict[str, Any]:
    """Kills a replica after a third of the requests.

    Returns:
        The load's figures; requests either go to another replica or fail with a status.
    """
    killed: list[int] = []

    def kill(number: int) -> None:
        if number == len(asked) // 3:
            killed.append(server.replicas()[0])
            os.kill(killed[0], signal.SIGKILL)

    before = len(server.replicas())
    told = load(server.address, asked, concurrency, after=kill, stream_every=4).told(len(asked))
    began = time.monotonic()
    while len(server.replicas()) < before and time.monotonic() - began < 120:
        time.sleep(0.5)
    server.wait()
    return {**told, "killed": len(killed), "replicas_before": before, "replicas_afterwards": len(server.replicas())}


def _gauge(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics", timeout=30, trust_env=False).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def with_clients_that_leave(server: Server, long_body: dict[str, Any], count: int) -> dict[str, Any]:
    """Sends long requests, half of them streamed, and leaves them; measures how long their places stay taken."""
    with httpx.Client(timeout=httpx.Timeout(60, read=0.3), trust_env=False) as client:
        for number in range(count):
            with suppress(httpx.ReadTimeout):
                client.post(f"{server.address}/v1/chat/completions", json={**long_body, "stream": number % 2 == 0})
    began = time.monotonic()
    taken = ("qzoom_requests_waiting", "qzoom_requests_running")
    while any(_gauge(server.address, name) for name in taken) and time.monotonic() - began < 60:
        time.sleep(0.05)
    left = sum(_gauge(server.address, name) for name in taken)
    return {"left": count, "seconds_until_free": round(time.monotonic() - began, 2), "places_still_taken": left}


def ended_while_it_answers(server: Server, asked: Sequence[Asked], concurrency: int) -> dict[str, Any]:
    """Sends SIGTERM when all requests are under way.

    Returns:
        The load's figures; every request that was accepted gets its answer.
    """

    def end() -> None:
        began = time.monotonic()
        wanted = min(concurrency, len(asked))
        while time.monotonic() - began < 30:
            under_way = sum(
                _gauge(server.address, name) for name in ("qzoom_requests_waiting", "qzoom_requests_running")
            )
            if under_way >= wanted:
                break
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    told = load(server.address, asked, concurrency).told(len(asked))
    ending.join()
    return {**told, "exit_status": server.stop()}


def memory_over(server: Server, asked: Sequence[Asked], requests: int, concurrency: int) -> dict[str, Any]:
    """Resident memory of the model's processes after each tenth of many requests."""
    share = max(1, requests // 10)
    tenths, right = [], 0
    for part in range(10):
        batch = [asked[(part * share + number) % len(asked)] for number in range(share)]
        right += load(server.address, batch, concurrency, stream_every=5).right
        tenths.append(round(server.resident_mib(), 1))
    grown = tenths[-1] - tenths[1]  # the first tenth fills caches
    return {"requests": 10 * share, "right": right, "mib_after_each_tenth": tenths, "mib_grown_since_second": grown}
