"""A worker: one model, one thread that runs its batches, and the way from a prompt to the events of its answer."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace

from ..asking.session import Session, open_session
from .batches import run_batch
from .config import ServeConfig
from .errors import INTERNAL, OVERLOADED, Failure, RequestFailed, failed, failure_of, timed_out
from .events import Answered, Event, Prompt
from .jobs import Job
from .rows import Row, prepare_row
from .waiting import BatchQueue


logger = logging.getLogger(__name__)

# batches that failed in a row after which a worker counts as broken: a device that has gone answers nothing any more
_MOST_FAILURES = 3


class Worker:
    """Answers prompts with one model; an `Engine`.

    Args:
        session: the model.
        config: limits and batches.
    """

    def __init__(self, session: Session, config: ServeConfig) -> None:
        self.session, self.config = session, config
        self.queue = BatchQueue(config)
        self._threads = ThreadPoolExecutor(config.prepare_threads, thread_name_prefix="prepare")
        self._failures = 0
        self._runner = threading.Thread(target=self._run, name="generate", daemon=True)
        self._runner.start()

    @classmethod
    def open(cls, config: ServeConfig) -> "Worker":
        """A worker with the model that the options name."""
        return cls(open_session(config.as_model_config()), config)

    async def check(self) -> None:
        """Returns where the model answers.

        Raises:
            RequestFailed: 503; its last batches all failed.
        """
        if self._failures >= _MOST_FAILURES or not self._runner.is_alive():
            raise failed(OVERLOADED, "the model does not answer any more; the server's log has the cause")

    async def answer(self, prompt: Prompt) -> AsyncIterator[Event]:
        """Events of one request; see `Engine`. Closing the iterator frees the request's place."""
        arrived = time.monotonic()
        try:
            self.queue.admit(prompt.choices)
        except RequestFailed as error:
            yield error.failure
            return
        loop = asyncio.get_running_loop()
        try:
            row = await loop.run_in_executor(self._threads, prepare_row, self.session, self.config, prompt)
        except BaseException as error:
            self.queue.give_back(prompt.choices)
            if not isinstance(error, Exception):
                raise
            yield failure_of(error)
            return
        async with aclosing(self._wait(prompt, row, arrived)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def _wait(self, prompt: Prompt, row: Row, arrived: float) -> AsyncIterator[Event]:
        """Puts a prepared request into the queue and yields what is told of it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed while a batch ran
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(prompt, row, self.session.processor.tokenizer, tell, arrived)
        try:
            self.queue.put(job)
        except RequestFailed as error:
            yield error.failure
            return
        try:
            while True:
                left = arrived + self.config.request_seconds - time.monotonic()
                try:
                    event = await asyncio.wait_for(events.get(), max(left, 0))
                except asyncio.TimeoutError:
                    event = timed_out(self.config.request_seconds)
                if isinstance(event, Answered) and prompt.report and job.report is not None:
                    described = await loop.run_in_executor(self._threads, row.describe, job.report)
                    event = replace(event, report=described)
                yield event
                if isinstance(event, Answered | Failure):
                    return
        finally:
            job.close()
            self.queue.remove(job)

    async def close(self) -> None:
        """Admits nobody more, and returns when what was admitted has been answered."""
        self.queue.end()
        await asyncio.to_thread(self._runner.join)
        self._threads.shutdown(wait=False)

    def _run(self) -> None:
        while batch := self.queue.take():
            began = time.monotonic()
            self._run_jobs(batch)
            self.queue.took(time.monotonic() - began)
            del batch  # or its images would stay until the next one comes

    def _run_jobs(self, jobs: list[Job]) -> None:
        """Runs a batch. Where it fails as a whole, those who have no word yet are asked again, each alone."""
        jobs = [job for job in jobs if not job.closed]
        if not jobs:
            return
        try:
            run_batch(self.session, jobs)
            self._failures = 0
        except Exception as error:
            failure = failure_of(error)
            if len(jobs) == 1:
                self._failures += failure.status == INTERNAL
                jobs[0].fail(failure)
                return
            for job in jobs:
                if job.has_spoken:
                    job.fail(failure)
                else:
                    self._run_jobs([job])
