"""The queue of a worker: bounded, and given out in batches of rows that share their options."""

import threading
import time
from collections import deque

from .config import BatchOptions
from .errors import RequestFailed, overloaded
from .jobs import Job


_PATIENCE = 10  # times as long is waited for requests that are known to come, because they are being prepared
_FASTEST_RETRY, _SLOWEST_RETRY = 1.0, 60.0  # seconds


class BatchQueue:
    """Jobs that wait, first come first served; whoever shares the options of the first one goes with it.

    Args:
        options: sizes of queue and batches.
    """

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._admitted = 0  # answers that wait, those still being prepared included
        self._queued = 0  # answers of the jobs
        self._bytes = 0  # of the jobs' prompts
        self._batch_seconds = 0.0
        self._ended = False

    @property
    def waiting(self) -> int:
        """Answers that were admitted and do not run yet."""
        return self._admitted

    def admit(self, answers: int) -> None:
        """Takes places in the queue.

        Raises:
            RequestFailed: 503; there are not so many left.
        """
        with self._changed:
            if self._ended or (self._admitted and self._admitted + answers > self._options.queue_rows):
                raise self._refusal()
            self._admitted += answers

    def _refusal(self) -> RequestFailed:
        """What is answered to whoever finds no place, with the time after which there should be one."""
        batches = 1 + self._admitted // self._options.batch_rows
        seconds = min(max(batches * self._batch_seconds, _FASTEST_RETRY), _SLOWEST_RETRY)
        return RequestFailed(overloaded(seconds))

    def give_back(self, answers: int) -> None:
        """Returns places that were taken for a request that will not run."""
        with self._changed:
            self._admitted -= answers
            self._changed.notify_all()

    def put(self, job: Job) -> None:
        """Adds a prepared job, whose places were taken before.

        Raises:
            RequestFailed: 503; the prompts that wait fill the memory that they may have. Its places are free again.
        """
        with self._changed:
            self._changed.notify_all()
            if self._jobs and self._bytes + job.row.bytes > self._options.queue_mib * 2**20:
                self._admitted -= len(job.choices)
                raise self._refusal()
            self._jobs.append(job)
            self._queued += len(job.choices)
            self._bytes += job.row.bytes

    def remove(self, job: Job) -> bool:
        """Takes a job out that nobody waits for any more; False where it runs already."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._drop(job)
            self._changed.notify_all()
            return True

    def _drop(self, job: Job) -> None:
        self._jobs.remove(job)
        self._queued -= len(job.choices)
        self._admitted -= len(job.choices)
        self._bytes -= job.row.bytes

    def took(self, seconds: float) -> None:
        """Notes how long a batch ran, from which the time of a next try is told."""
        self._batch_seconds = seconds

    def end(self) -> None:
        """Admits nobody more; `take` gives out what is there, and then nothing."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self) -> list[Job]:
        """The next batch; waits for one. Empty at the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                if self._jobs:
                    batch, is_full = self._select()
                    patience = _PATIENCE if self._admitted > self._queued else 1
                    missing = self._jobs[0].queued + patience * self._options.batch_wait - now
                    if is_full or missing <= 0 or self._ended:
                        for job in batch:
                            self._drop(job)
                        return batch
                    self._changed.wait(missing)
                elif self._ended and not self._admitted:  # admitted and still being prepared: it will come
                    return []
                else:
                    self._changed.wait()

    def _select(self) -> tuple[list[Job], bool]:
        """The batch of the first job, and whether nothing more would fit."""
        first = self._jobs[0]
        batch: list[Job] = []
        rows, longest = 0, 0
        for job in self._jobs:
            if job.row.key != first.row.key:
                continue
            rows += len(job.choices)
            longest = max(longest, job.row.prompt_tokens + job.row.max_new_tokens)
            if batch and (rows > self._options.batch_rows or rows * longest > self._options.batch_tokens):
                return batch, True
            batch.append(job)
        return batch, rows >= self._options.batch_rows
