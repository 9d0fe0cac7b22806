"""Many requests at once, each answer compared with the one it must be."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.utils import httpx

from hub_release.measure.serving.questions import Asked


_TRIES = 200


@dataclass
class Outcome:
    """What came of many requests.

    Attributes:
        seconds: from the first request to the last answer.
        right: answers that are those of `generate` alone.
        wrong: other answers.
        refused: answers 503, which were asked again.
        failed: other statuses, and connections that broke.
        ids: of all answers.
        texts: answers by the number of their request.
        tokens: of answers that were not streamed.
    """

    seconds: float = 0.0
    right: int = 0
    wrong: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: int = 0

    def told(self, requests: int) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "requests": requests,
            "seconds": round(self.seconds, 2),
            "per_second": round(requests / self.seconds, 2),
            "right": self.right,
            "wrong": self.wrong,
            "lost": requests - self.right - self.wrong - len(self.failed),
            "doubled": self.right + self.wrong - len(self.ids),
            "failed": len(self.failed),
            "failures": sorted(set(self.failed))[:5],
            "asked_again": self.refused,
        }


@dataclass(frozen=True)
class _Got:
    """One answer: its status (0 where a stream broke off), its id, its text and its tokens."""

    status: int
    id: str
    text: str
    tokens: int = 0


async def _streamed(client: Any, address: str, body: dict[str, Any]) -> _Got:
    async with client.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return _Got(response.status_code, "", (await response.aread()).decode()[:300])
        name, text = "", ""
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return _Got(200, name, text)
            if line.startswith("data: "):
                piece = json.loads(line[6:])
                if "error" in piece:
                    return _Got(0, name, piece["error"]["message"])
                name = piece["id"]
                text += "".join(choice["delta"].get("content") or "" for choice in piece["choices"])
        return _Got(0, name, "the stream has no end")


async def _answer(client: Any, address: str, body: dict[str, Any], streams: bool) -> _Got:
    if streams:
        return await _streamed(client, address, body)
    response = await client.post(f"{address}/v1/chat/completions", json=body)
    if response.status_code != 200:
        return _Got(response.status_code, "", response.text[:300])
    content = response.json()
    text, tokens = content["choices"][0]["message"]["content"], content["usage"]["completion_tokens"]
    return _Got(200, content["id"], text, tokens)


async def _ask(client: Any, address: str, number: int, asked: Asked, streams: bool, outcome: Outcome) -> None:
    """One request; refused for overload it is sent again, as a client would."""
    for _ in range(_TRIES):
        try:
            got = await _answer(client, address, asked.body, streams)
        except httpx.TransportError as error:
            outcome.failed.append(type(error).__name__)
            return
        if got.status != 503:
            break
        outcome.refused += 1
        await asyncio.sleep(0.1)
    if got.status != 200:
        outcome.failed.append(f"{got.status}: {got.text}")
        return
    outcome.ids.add(got.id)
    outcome.texts[number] = got.text
    outcome.tokens += got.tokens
    if asked.expected is None or got.text == asked.expected:
        outcome.right += 1
    else:
        outcome.wrong += 1


async def run_load(
    address: str, asked: Sequence[Asked], concurrency: int, *, stream_every: int = 0, after: Any = None
) -> Outcome:
    """Sends all requests, so many at a time.

    Args:
        address: of the server.
        asked: the requests, in order.
        concurrency: requests under way.
        stream_every: every n-th answer is streamed; 0 for none.
        after: called with the number of requests that were sent, before each of them.
    """
    outcome, waiting = Outcome(), iter(enumerate(asked))
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:

        async def work() -> None:
            for number, each in waiting:
                if after is not None:
                    after(number)
                streams = bool(stream_every) and number % stream_every == 0
                await _ask(client, address, number, each, streams, outcome)

        began = time.monotonic()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        outcome.seconds = time.monotonic() - began
    return outcome


def load(address: str, asked: Sequence[Asked], concurrency: int, **options: Any) -> Outcome:
    """`run_load`, waited for."""
    return asyncio.run(run_load(address, asked, concurrency, **options))
