"""The queue: bounded, in order, and in batches that fit together."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from modeling_qzoom.serving.config import BatchOptions
from modeling_qzoom.serving.errors import RequestFailed
from modeling_qzoom.serving.events import Prompt
from modeling_qzoom.serving.jobs import Job
from modeling_qzoom.serving.rows import Row
from modeling_qzoom.serving.sampling import Draw
from modeling_qzoom.serving.waiting import BatchQueue
from modeling_qzoom.zoom_options_qzoom import ZoomOptions


def queue(**options) -> BatchQueue:
    return BatchQueue(BatchOptions(**{"batch_rows": 4, "batch_wait": 0, "queue_rows": 8, **options}))


def job(answers: int = 1, tokens: int = 10, mib: int = 0, **options) -> Job:
    draws = [Draw(0.0, 1.0, 0, 0)] * answers
    features = {"source_images": [torch.zeros(mib, 2**20, dtype=torch.uint8)]}
    row = Row(features, replace(ZoomOptions(), **options), draws, tokens, 2, False)
    return Job(Prompt([], choices=answers), row, SimpleNamespace(), lambda event: None, 0.0)


def put(waiting: BatchQueue, *jobs: Job) -> None:
    for each in jobs:
        waiting.admit(len(each.choices))
        waiting.put(each)


def test_rows_with_the_same_options_go_together_in_order() -> None:
    waiting = queue()
    jobs = [job(), job(zoom="never"), job(), job(answers=2), job(), job(zoom="never")]
    put(waiting, *jobs)
    batches = [waiting.take() for _ in range(3)]
    assert batches == [[jobs[0], jobs[2], jobs[4]], [jobs[1], jobs[5]], [jobs[3]]]
    assert waiting.waiting == 0


def test_a_batch_waits_longer_for_those_that_are_being_prepared() -> None:
    waiting = queue(batch_wait=0.1)
    put(waiting, first := job())
    began = time.monotonic()
    assert waiting.take() == [first] and 0.05 < time.monotonic() - began < 0.8
    put(waiting, first := job())
    waiting.admit(1)
    threading.Timer(0.3, waiting.put, [late := job()]).start()
    assert waiting.take() == [first, late]
    put(waiting, first := job())
    waiting.admit(1)
    began = time.monotonic()
    assert waiting.take() == [first] and time.monotonic() - began > 0.8  # but not for ever


def test_a_batch_is_bounded_in_rows_and_in_tokens() -> None:
    waiting = queue()
    put(waiting, *(job() for _ in range(6)))
    assert [len(waiting.take()) for _ in range(2)] == [4, 2]
    waiting = queue(batch_tokens=36)
    put(waiting, *(job() for _ in range(6)))  # 12 tokens each, the answer's 2 among them
    assert [len(waiting.take()) for _ in range(2)] == [3, 3]
    waiting = queue(batch_tokens=36)
    put(waiting, job(), job(tokens=500), job())  # too long for any batch: alone, and nobody waits for ever
    assert [len(waiting.take()) for _ in range(3)] == [1, 1, 1]


def test_what_exceeds_the_queue_is_refused_with_a_time_for_the_next_try() -> None:
    waiting = queue()
    waiting.took(3.0)
    put(waiting, *(job() for _ in range(8)))
    with pytest.raises(RequestFailed) as caught:
        waiting.admit(1)
    failure = caught.value.failure
    assert failure.status == 503 and failure.headers() == {"Retry-After": "9"}  # two batches wait, one may run
    waiting.take()
    waiting.admit(4)
    waiting.give_back(4)
    assert waiting.waiting == 4


def test_prompts_that_wait_are_bounded_in_memory() -> None:
    waiting = queue(queue_mib=10)
    put(waiting, job(mib=20))  # alone it may be as large as a request may be
    with pytest.raises(RequestFailed):
        put(waiting, job(mib=1))
    assert waiting.waiting == 1
    waiting.take()
    put(waiting, job(mib=6), job(mib=3))
    assert waiting.waiting == 2


def test_whoever_leaves_frees_the_place() -> None:
    waiting = queue()
    first, second = job(), job(answers=2)
    put(waiting, first, second)
    assert waiting.remove(second) and not waiting.remove(second) and waiting.waiting == 1
    assert waiting.take() == [first] and not waiting.remove(first)


def test_the_end_gives_out_what_was_admitted_and_nothing_more() -> None:
    waiting = queue(batch_wait=60)
    only = job()
    put(waiting, only)
    waiting.admit(1)  # still being prepared when the end comes
    waiting.end()
    assert waiting.take() == [only]
    late = job()
    threading.Timer(0.1, waiting.put, [late]).start()
    assert waiting.take() == [late] and waiting.take() == []
    with pytest.raises(RequestFailed):
        waiting.admit(1)
