"""What may happen to a server, and what its clients are told of it."""

import asyncio
import gc
import logging
import threading
import time

import openai
import pytest
from huggingface_hub.utils import httpx

from modeling_qzoom.serving import batches, worker
from modeling_qzoom.serving.app import build_api
from modeling_qzoom.serving.events import Begun, Words
from modeling_qzoom.serving.jobs import Job
from modeling_qzoom.serving.rows import Row
from tests.serving.loopback import body, client, demo_config, demo_session, listening, pages, question, serving


HELLO = [{"role": "user", "content": "hello"}]
LONG = body(HELLO, max_tokens=64, temperature=2.0, seed=1)


def metric(address: str, name: str, headers=None) -> float:
    text = httpx.get(f"{address}/metrics", headers=headers).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def until(condition, seconds: float = 10.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


@pytest.fixture
def held(monkeypatch):
    """Batches wait for the event before they run."""
    go = threading.Event()
    run = batches.run_batch

    def waiting(session, jobs):
        assert go.wait(30)
        run(session, jobs)

    monkeypatch.setattr(worker, "run_batch", waiting)
    yield go
    go.set()


def post(address: str, content, **options):
    return httpx.post(f"{address}/v1/chat/completions", json=content, timeout=30, **options)


def test_a_full_queue_answers_503_with_a_time(held) -> None:
    with serving(batch_rows=1, queue_rows=2) as (address, engine):
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(address, LONG))) for _ in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        until(lambda: engine.queue.waiting == 2)  # one runs, two wait
        refused = post(address, LONG)
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        assert metric(address, "qzoom_requests_waiting") + metric(address, "qzoom_requests_running") == 3
        held.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3


def test_a_request_that_takes_too_long_ends_with_504(held) -> None:
    with serving(request_seconds=0.5) as (address, engine):
        began = time.monotonic()
        answer = post(address, LONG)
        assert answer.status_code == 504 and "within 0.5 seconds" in answer.json()["error"]["message"]
        assert time.monotonic() - began < 5
        held.set()
        assert post(address, body(HELLO, max_tokens=1)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(stream, monkeypatch) -> None:
    monkeypatch.setattr(demo_session().model.generation_config, "min_new_tokens", 2500)  # takes many seconds
    with serving(max_new_tokens=3000) as (address, engine):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(10, read=0.4)) as impatient:
            content = {**LONG, "max_tokens": 3000, "n": 2, "stream": stream}
            with impatient.stream("POST", f"{address}/v1/chat/completions", json=content) as response:
                if stream:
                    assert next(response.iter_lines()).startswith("data: ")
                    raise httpx.ReadTimeout("left")
        until(lambda: metric(address, "qzoom_requests_running ") == 0 == metric(address, "qzoom_requests_waiting "))
        monkeypatch.undo()
        began = time.monotonic()
        assert post(address, body(HELLO, max_tokens=1)).status_code == 200
        assert time.monotonic() - began < 5


def test_our_own_fault_is_a_500_without_internals(monkeypatch, caplog) -> None:
    def broken(session, jobs):
        raise RuntimeError("secret path /weights")

    monkeypatch.setattr(worker, "run_batch", broken)
    with serving() as (address, engine), caplog.at_level(logging.ERROR):
        for _ in range(3):
            answer = post(address, LONG)
            assert answer.status_code == 500 and "secret" not in answer.text
        number = answer.json()["error"]["message"].split()[-1]
        assert number in caplog.text and "secret path" in caplog.text
        assert httpx.get(f"{address}/health").status_code == 503  # every batch failed: start me anew


def test_one_bad_row_does_not_take_its_batch_along(monkeypatch, held) -> None:
    run = worker.run_batch

    def picky(session, jobs):
        if any(job.prompt.sampling.seed == 13 for job in jobs):
            raise RuntimeError("out of memory")
        run(session, jobs)

    monkeypatch.setattr(worker, "run_batch", picky)
    with serving() as (address, engine):
        answers = {}

        def ask(seed: int) -> None:
            answers[seed] = post(address, {**LONG, "seed": seed, "max_tokens": 4}).status_code

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in (11, 12, 13, 14)]
        for thread in threads:
            thread.start()
        held.set()
        for thread in threads:
            thread.join()
        assert answers == {11: 200, 12: 200, 13: 500, 14: 200}
        assert httpx.get(f"{address}/health").status_code == 200


class Breaking:
    """An engine whose process dies in the middle."""

    async def answer(self, prompt):
        yield Begun(0.0, 1)
        yield Words(0, "so far")
        raise ConnectionError("gone")

    async def check(self) -> None:
        pass


def test_a_stream_that_breaks_off_says_so() -> None:
    with listening(build_api(demo_config(), Breaking())) as address:
        said = ""
        with pytest.raises(openai.APIError, match="the server failed on this request"):
            for piece in client(address).chat.completions.create(**{**LONG, "stream": True}):
                said += piece.choices[0].delta.content or ""
        assert said == "so far" and metric(address, "qzoom_streams_broken_off_total") == 1
        assert post(address, LONG).status_code == 500


def test_a_key_is_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("QZOOM_TEST_KEY", "open sesame")
    with serving(api_key_variable="QZOOM_TEST_KEY") as (address, engine):
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(f"{address}{path}").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").models.list()
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").chat.completions.create(**LONG)
        assert client(address, "open sesame").chat.completions.create(**LONG).choices
        assert httpx.get(f"{address}/health").status_code == 200
    monkeypatch.delenv("QZOOM_TEST_KEY")
    with pytest.raises(ValueError, match="names QZOOM_TEST_KEY, which is not set"):
        demo_config(api_key_variable="QZOOM_TEST_KEY").api_key()


def test_what_was_accepted_is_answered_while_a_server_drains(held) -> None:
    with serving() as (address, engine):
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(address, LONG)))
        thread.start()
        until(lambda: metric(address, "qzoom_requests_waiting") == 1)
        engine.queue.end()
        assert post(address, LONG).status_code == 503
        held.set()
        thread.join()
        assert answers[0].status_code == 200
        asyncio.run(engine.close())


def test_an_answer_that_the_checkpoints_own_limits_cut_short_is_told(monkeypatch) -> None:
    monkeypatch.setattr(demo_session().model.generation_config, "max_time", 0.0)
    with serving() as (address, engine):
        answer = post(address, LONG).json()
        assert answer["usage"]["completion_tokens"] == 1 and answer["choices"][0]["finish_reason"] == "length"


def test_nothing_of_a_request_is_kept() -> None:
    """Whatever its end: answered, streamed, refused, or left by its client."""
    with serving() as (address, engine):
        image, text = pages(4)[0]
        for fields in ({}, {"zoom": {"overlay": True}}, {"n": 2, "temperature": 1.0}, {"zoom": {"zoom": "x"}}):
            post(address, body(question(text, image), **fields))
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**LONG, "stream": True}) as response:
            next(response.iter_lines())

        def kept() -> int:
            gc.collect()
            return sum(type(each) in (Job, Row) for each in gc.get_objects())

        until(lambda: kept() == 0)
        assert engine.queue.waiting == 0


def test_metrics_count_what_happened() -> None:
    with serving() as (address, engine):
        image, text = pages(4)[0]
        post(address, body(question(text, image), zoom={"zoom": "always"}))
        post(address, body(question(text, image), zoom={"zoom": "never"}))
        post(address, body(HELLO, temperature=7))
        counted = {
            'qzoom_requests_total{status="200"}': 2,
            'qzoom_requests_total{status="400"}': 1,
            'qzoom_rows_total{reason="forced"}': 1,
            'qzoom_rows_total{reason="off"}': 1,
            "qzoom_queue_seconds_count": 2,
            "qzoom_step_seconds_count": 2,
        }
        assert {name: metric(address, name) for name in counted} == counted
        assert metric(address, 'qzoom_visual_tokens_total{view="crop"}') > 0
