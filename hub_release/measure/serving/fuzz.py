"""Malformed requests, drawn from a seed: broken bytes, broken JSON, and good requests with something wrong in them."""

import base64
import copy
import json
import random
from collections import Counter
from typing import Any

from huggingface_hub.utils import httpx


_STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, -0.5, 10**30),
    *("", "x", "\u0000", "🙂" * 50, "a" * 5000),
    *([], {}, [[]], [None], {"a": {"b": []}}),
)
_URLS = (
    "",
    "data:",
    "data:,",
    "data:image/png;base64,",
    "data:image/png;base64,!!!!",
    "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(64)).decode(),
    "data:image/gif;base64," + base64.b64encode(b"GIF89a" + bytes(range(64))).decode(),
    "data:image/svg+xml,<svg/>",
    "data:text/html,<html></html>",
    "file:///etc/passwd",
    "/etc/passwd",
    "http://127.0.0.1/a.png",
    "http://[::1]:80/a.png",
    "https://example.com/a.png",
    "http://" + "a" * 300 + "/b.png",
    "http://host:99999999/x",
    "http://:@/",
    "ftp://example.com/a.png",
    "gopher://x",
    "\ud800",
)
_ZOOM: dict[str, tuple[Any, ...]] = {
    "zoom": ("sometimes", 1, []),
    "effort": ("enormous", 3),
    "gate_threshold": (-1, "x", 1e400, {}),
    "region_threshold": (-1, "0.1"),
    "region_threshold_mode": ("top",),
    "crop_min_tokens": (0, -4, 1.5, 10**9, "4"),
    "crop_max_tokens": (0, 10**12, [4]),
    "position_alignment": ("diagonal", 7),
    "min_tokens": (0, 10**9, "many"),
    "max_tokens": (-1, 2.5),
    "report": ("yes", 2),
    "overlay": ("x",),
    "zom": ("auto",),
}


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places inside a JSON value."""
    found = [at] if at else []
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        found += _paths(inner, (*at, step))
    return found


def _changed(good: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A good request with one place changed, taken out, or added to."""
    request = copy.deepcopy(good)
    *parents, last = rng.choice(_paths(request))
    place = request
    for step in parents:
        place = place[step]
    kind = rng.randrange(4)
    if kind == 0:
        del place[last]
    elif kind == 1 and isinstance(place, dict):
        place[f"{last}_"] = rng.choice(_STRANGE)
    elif last == "url":
        place[last] = rng.choice(_URLS)
    else:
        place[last] = rng.choice(_STRANGE)
    return request


def _zoomed(good: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A good request with a zoom option that is none."""
    name = rng.choice(list(_ZOOM))
    return {**copy.deepcopy(good), "zoom": {name: rng.choice(_ZOOM[name])}}


def malformed(good: dict[str, Any], count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """Kinds and bodies of requests that are wrong, most of them; what is left unharmed may well be answered.

    Args:
        good: a request that is answered.
        count: number of requests.
        seed: of the draw.
    """
    rng, requests = random.Random(seed), []
    for _ in range(count):
        kind = rng.choice(("bytes", "cut", "json", "field", "field", "field", "zoom", "deep"))
        if kind == "bytes":
            body = rng.randbytes(rng.randrange(200))
        elif kind == "deep":
            body = b"[" * rng.randrange(1, 50_000)
        elif kind == "json":
            body = json.dumps(rng.choice(_STRANGE)).encode()
        else:
            body = json.dumps(_zoomed(good, rng) if kind == "zoom" else _changed(good, rng)).encode()
            if kind == "cut":
                body = body[: rng.randrange(len(body))]
        requests.append((kind, body))
    return requests


def fuzz(address: str, good: dict[str, Any], count: int, seed: int = 0) -> dict[str, Any]:
    """Sends malformed requests one after another.

    Returns:
        How many came back with which status; `server_errors`, the bodies that led to a status of 500 or more; and
        whether every refusal is an error with a message.
    """
    statuses: Counter[str] = Counter()
    server_errors, unworded = [], 0
    with httpx.Client(timeout=120, trust_env=False) as client:
        for kind, body in malformed(good, count, seed):
            headers = {"Content-Type": "application/json"}
            response = client.post(f"{address}/v1/chat/completions", content=body, headers=headers)
            statuses[str(response.status_code)] += 1
            if response.status_code >= 500:
                server_errors.append(f"{kind}: {body[:300]!r} → {response.text[:300]}")
            if response.status_code != 200:
                unworded += not response.json().get("error", {}).get("message")
        healthy = client.get(f"{address}/health").status_code
    return {
        "requests": count,
        "statuses": dict(statuses),
        "server_errors": server_errors,
        "without_message": unworded,
        "health_afterwards": healthy,
    }
