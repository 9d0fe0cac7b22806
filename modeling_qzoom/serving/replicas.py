"""Replicas of a worker on Ray Serve, and the engine that spreads prompts over them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from .config import ServeConfig
from .errors import OVERLOADED, Failure, RequestFailed, failed, overloaded, timed_out
from .events import Answered, Event, Prompt, Words
from .worker import Worker


_TRIES = 3
_RETRY_SECONDS = 2.0
_GRACE_SECONDS = 5.0  # beyond the replica's own limit, in which it tells by itself
_CHECK_SECONDS = 5.0


class Replica:
    """One copy of the model in a process of its own.

    Args:
        options: those of `ServeConfig`, by name.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._worker = Worker.open(ServeConfig(**options))

    async def answer(self, prompt: Prompt) -> AsyncIterator[Event]:
        """Events of one request."""
        async with aclosing(self._worker.answer(prompt)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def is_well(self) -> bool:
        """Whether the model answers."""
        try:
            await self._worker.check()
        except RequestFailed:
            return False
        return True

    async def check_health(self) -> None:
        """Asked by Ray Serve, which starts a replica anew that raises here."""
        await self._worker.check()


class ReplicaEngine:
    """Sends each prompt to a replica; where that dies before it has said a word, to another. An `Engine`.

    Args:
        handle: of the deployment of `Replica`.
        seconds: after which a request is given up.
    """

    def __init__(self, handle: Any, seconds: float) -> None:
        self._handle, self._seconds = handle, seconds

    async def answer(self, prompt: Prompt) -> AsyncIterator[Event]:
        """Events of one request; see `Engine`. Closing the iterator frees the request's place in the replica."""
        deadline = time.monotonic() + self._seconds + _GRACE_SECONDS
        for _ in range(_TRIES):
            has_spoken = is_over = False
            events = self._handle.options(stream=True).answer.remote(prompt)
            try:
                while (event := await _next(events, deadline)) is not None:
                    has_spoken = has_spoken or isinstance(event, Words)
                    is_over = is_over or isinstance(event, Answered | Failure)
                    yield event
                if is_over:
                    return
            except BackPressureError:
                yield overloaded(_RETRY_SECONDS)
                return
            except asyncio.TimeoutError:
                yield timed_out(self._seconds)
                return
            except (RayError, RayServeException):  # the replica has died, or dies
                if is_over:
                    return
            finally:
                if not is_over:
                    with suppress(RayError):
                        events.cancel()
            if has_spoken:
                break
        died = "the process that was answering has died; ask again"
        yield Failure(OVERLOADED, died, retry_after=_RETRY_SECONDS)

    async def check(self) -> None:
        """Returns where a replica answers.

        Raises:
            RequestFailed: 503; none does.
        """
        try:
            if await asyncio.wait_for(self._handle.is_well.remote(), _CHECK_SECONDS):
                return
        except BackPressureError:  # busy, and so alive
            return
        except (asyncio.TimeoutError, RayError, RayServeException):
            pass
        raise failed(OVERLOADED, "no replica of the model answers at present", retry_after=_RETRY_SECONDS)


async def _next(events: Any, deadline: float) -> Event | None:
    """The next event, None at the end.

    Raises:
        asyncio.TimeoutError: there was none before the deadline.
    """
    try:
        return await asyncio.wait_for(anext(events), max(deadline - time.monotonic(), 0))
    except StopAsyncIteration:
        return None
