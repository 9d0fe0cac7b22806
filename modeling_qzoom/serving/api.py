"""The HTTP side: an application that checks requests, hands prompts to an engine and words its events."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from .completions import Completion, broken_off
from .config import ServeConfig
from .errors import (
    CLIENT_GONE,
    OVERLOADED,
    REQUEST_TIMEOUT,
    TOO_LARGE,
    UNAUTHORIZED,
    Failure,
    RequestFailed,
    failed,
    failure_of,
)
from .events import Answered, Begun, Engine, Event, Prompt, Words
from .metrics import Metrics
from .schema import parse_request
from .translation import to_prompt


_RETRY_SECONDS = 2.0


class Api:
    """What the routes share.

    Args:
        config: options of the server.
        engine: whoever answers.
    """

    def __init__(self, config: ServeConfig, engine: Engine) -> None:
        self.config, self.engine, self.metrics = config, engine, Metrics()
        self.started = int(time.time())
        self.is_draining = False
        self.in_flight = 0
        self._key = config.api_key()

    def admit(self, request: Request) -> None:
        """Checks the key of a request.

        Raises:
            RequestFailed: 401.
        """
        if self._key is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            raise failed(UNAUTHORIZED, "the API key is missing or wrong; send it as: Authorization: Bearer KEY.")

    async def body_of(self, request: Request) -> bytes:
        """The body, no longer than it may be.

        Raises:
            RequestFailed: 413.
        """
        limit = int(self.config.max_body_mib * 2**20)
        too_large = failed(
            TOO_LARGE, f"the request is larger than {self.config.max_body_mib:g} MiB; send fewer or smaller images."
        )
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
        except ClientDisconnect:
            raise failed(CLIENT_GONE, "the client has left") from None
        return bytes(body)

    async def events(self, prompt: Prompt) -> AsyncIterator[Event]:
        """The engine's events, counted; a failure of the engine itself is one of them."""
        gauge = self.metrics.waiting
        gauge.inc()
        self.in_flight += 1
        try:
            async with aclosing(self.engine.answer(prompt)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, Begun) and gauge is self.metrics.waiting:
                        gauge.dec()
                        gauge = self.metrics.running
                        gauge.inc()
                        self.metrics.begun(event)
                    elif isinstance(event, Answered):
                        self.metrics.answered(event)
                    yield event
        except Exception as error:
            yield failure_of(error)
        finally:
            gauge.dec()
            self.in_flight -= 1

    async def chat(self, request: Request) -> Response:
        """Answers a request.

        Raises:
            RequestFailed: it gets no answer.
        """
        self.admit(request)
        if self.is_draining:
            raise failed(OVERLOADED, "this server is being shut down; try another one.", retry_after=_RETRY_SECONDS)
        try:
            body = await asyncio.wait_for(self.body_of(request), self.config.request_seconds)
        except asyncio.TimeoutError:
            raise failed(REQUEST_TIMEOUT, "the request did not arrive in time; send it again.") from None
        chat = parse_request(body)
        prompt = await to_prompt(chat, self.config)
        stream = chat.stream_options
        completion = Completion(self.config.name, stream is not None and stream.include_usage)
        events = self.events(prompt)
        is_streaming = False
        try:
            first = await _unless_gone(request, anext(events))
            if isinstance(first, Failure):
                raise RequestFailed(first)
            if chat.stream:
                is_streaming = True
                pieces = self._pieces(events, completion, prompt.choices)
                return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            return JSONResponse(completion.whole(await _unless_gone(request, _last(events))))
        finally:
            if not is_streaming:
                await events.aclose()  # type: ignore[attr-defined]

    async def _pieces(
        self, events: AsyncIterator[Event], completion: Completion, choices: int
    ) -> AsyncIterator[bytes]:
        """A stream's lines; whoever leaves closes them and with them the request."""
        async with aclosing(events) as following:  # type: ignore[type-var]
            yield completion.opening(choices)
            async for event in following:
                if isinstance(event, Words):
                    yield completion.words(event)
                elif isinstance(event, Answered):
                    yield completion.closing(event)
                elif isinstance(event, Failure):
                    self.metrics.broken.inc()
                    yield broken_off(event)


async def _last(events: AsyncIterator[Event]) -> Answered:
    """The answer at the end of the events.

    Raises:
        RequestFailed: there is none.
    """
    async for event in events:
        if isinstance(event, Answered):
            return event
        if isinstance(event, Failure):
            raise RequestFailed(event)
    raise RuntimeError("the engine ended without an answer")


async def _unless_gone(request: Request, work: Any) -> Any:
    """What some work returns, given up where the client leaves first.

    Raises:
        RequestFailed: the client has left; nobody will read it.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise failed(CLIENT_GONE, "the client has left")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has left; for a request whose body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
