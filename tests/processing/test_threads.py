"""One processor in several threads: a call sees its own text options and nobody else's."""

import copy
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from transformers import Qwen2VLImageProcessor

from modeling_qzoom import QZoomProcessor
from tests.processing_fixtures import PROCESSORS, chat, noise, process, qwen_processor


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def results_beside(call: Callable[[], object], disturbance: Callable[[], object], seconds: float = 0.5) -> set[str]:
    """What a call returns while other threads run something else."""
    results, until = set(), time.monotonic() + seconds

    def work() -> None:
        while time.monotonic() < until:
            try:
                results.add(str(call()))
            except Exception as error:
                results.add(repr(error))

    def disturb() -> None:
        while time.monotonic() < until:
            disturbance()

    threads = [threading.Thread(target=target) for target in (work, disturb, work, disturb)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


OTHERS = [
    {"truncation": True, "max_length": 5},
    {"padding": "max_length", "max_length": 90},
    {"pad_to_multiple_of": 32, "padding_side": "right"},
    {"padding": False, "return_tensors": None},
]


@pytest.mark.parametrize("family", list(PROCESSORS))
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_options_of_another_thread(family, other):
    processor = PROCESSORS[family]()

    def call() -> object:
        return processor(text=["a few words", "and some words more"])["input_ids"].tolist()

    expected = str(call())
    assert results_beside(call, lambda: processor(text=["other", "words of others"], **other)) == {expected}


def test_processors_that_share_a_tokenizer():
    first = qwen_processor()
    second = QZoomProcessor(Qwen2VLImageProcessor(), first.tokenizer, max_tokens=9)
    chats = [chat("short"), chat(noise(56, 56), "not as short")]

    def call() -> object:
        return process(first, chats)["input_ids"].tolist()

    expected = str(call())
    assert results_beside(call, lambda: second(text="x" * 50, truncation=True, max_length=7)) == {expected}


def test_asking_a_processor_for_its_tokens_disturbs_nobody():
    """LLaVA's processor tokenizes when it is built, which every look at `image_token` does."""
    processor = PROCESSORS["llava"]()

    def call() -> object:
        return processor(text=["a few words", "more"], truncation=True, max_length=4)["input_ids"].tolist()

    expected = str(call())
    assert results_beside(call, lambda: processor.image_token_id) == {expected}


def test_copies_of_a_processor_in_use():
    processor = qwen_processor()
    expected = processor(text="some words")["input_ids"].tolist()
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.tokenizer is not processor.tokenizer
        assert twin(text="some words")["input_ids"].tolist() == expected
    assert type(processor.backbone_processor.tokenizer) is type(processor.tokenizer)
    assert processor.backbone_processor.tokenizer is processor.tokenizer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork no process inherits a lock")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_amid_a_call_can_work():
    processor, is_over = qwen_processor(), threading.Event()
    long = "many words " * 3000

    def work() -> None:
        while not is_over.is_set():
            processor(text=long)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                processor(text="a few words")
                os._exit(0)
            until = time.monotonic() + 5
            while not (status := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() > until:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    pytest.fail("the child waits for a thread that it does not have")
                time.sleep(0.01)
            assert status[1] == 0
    finally:
        is_over.set()
        thread.join()
