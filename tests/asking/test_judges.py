"""Judges: metrics, an LLM behind an endpoint (a server in this process), and the VLM itself."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from modeling_qzoom.asking import judges
from modeling_qzoom.asking.config import JudgeConfig, ModelConfig
from modeling_qzoom.asking.judges import judge_for, judge_messages, normalize, parse_verdict
from modeling_qzoom.asking.session import Session
from tests.generation_fixtures import shared_model
from tests.processing_fixtures import PROCESSORS
from tests.tiny import FAMILIES


def verdict(kind: str, answer: str, *truths: str, **options) -> bool:
    return judge_for(JudgeConfig(kind=kind, **options), None).judge(["?"], [truths], [answer])[0]


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer", "truths", "expected"),
    [
        ("exact", "Blue ", ("blue",), True),
        ("exact", "light blue", ("blue",), False),
        ("anls", "colour", ("color",), True),
        ("anls", "zebra", ("color",), False),
        ("relaxed", "103", ("100",), True),
        ("relaxed", "107", ("100",), False),
        ("contains", "It is the Blue one.", ("blue", "navy"), True),
        ("contains", "blue", ("light-blue",), True),
        ("contains", "1,000", ("1000",), True),
        ("contains", "the cat's", ("cats",), True),
        ("contains", "19", ("2019",), False),
        ("contains", "3", ("3.5",), False),
        ("contains", "no", ("north",), False),
        ("contains", "北京", ("北京市",), True),
        ("contains", "!?", ("?",), False),
    ],
)
def test_metrics(kind, answer, truths, expected):
    assert verdict(kind, answer, *truths) is expected


@pytest.mark.parametrize("kind", ["exact", "anls", "relaxed", "contains"])
def test_an_empty_answer_is_never_right(kind):
    assert not verdict(kind, "  ", " ")


def test_threshold_of_anls():
    # one of five letters differs
    assert verdict("anls", "abcdx", "abcde", threshold=0.8)
    assert not verdict("anls", "abcdx", "abcde", threshold=0.81)


def test_normalize():
    assert normalize(" Don't  STOP—at 3.5%, or 1,234 (ok)? ") == "dont stop at 3.5 or 1234 ok"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "guess"}, "judge.kind must be one of .*'guess'"),
        ({"kind": "anls", "threshold": 0.0}, "judge.threshold"),
        ({"kind": "endpoint", "llm": "m"}, "needs judge.base_url"),
        ({"kind": "endpoint", "llm": "m", "base_url": "http://x", "concurrency": 0}, "judge.concurrency"),
    ],
)
def test_refused_settings(options, message):
    with pytest.raises(ValueError, match=message):
        judge_for(JudgeConfig(**options), None)


# --- endpoint --------------------------------------------------------------------------------------------------------


class Endpoint:
    """An OpenAI-compatible server that answers with what `reply(body, number)` gives: text, or a status."""

    def __init__(self, reply):
        self.requests, self.keys, lock = [], set(), threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(body)
                    endpoint.keys.add(self.headers["Authorization"])
                    number = len(endpoint.requests)
                given = reply(body, number)
                status = given if isinstance(given, int) else 200
                message = {"role": "assistant", "content": given}
                answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "model": "judge"}
                data = json.dumps(answer if status == 200 else {"error": "broken"}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint(monkeypatch):
    """Makes servers that are shut down in the end."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(judges, "FIRST_PAUSE", 0.0)
    monkeypatch.setenv("HF_TOKEN", "hub-secret")
    made = []

    def make(reply):
        made.append(Endpoint(reply))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def ask(url: str, answers: list[str], **options) -> list[bool]:
    judge = judge_for(JudgeConfig(kind="endpoint", base_url=url, llm="judge", concurrency=4, **options), None)
    return judge.judge([f"question {n}?" for n in range(len(answers))], [("seven", "7")] * len(answers), answers)


def _by_answer(body, number):
    return "Yes." if body["messages"][-1]["content"].split("Answer of the model: ")[1].startswith("right") else "No"


def test_endpoint(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server = endpoint(_by_answer)
    answers = ["right", "wrong", "", "right too", "wrong", "right"]
    assert ask(server.url, answers, api_key_variable="JUDGE_KEY") == [True, False, False, True, False, True]
    assert len(server.requests) == 5  # the empty answer needs no judge
    assert server.keys == {"Bearer secret"}
    assert {(body["model"], body["temperature"]) for body in server.requests} == {("judge", 0.0)}
    text = str(server.requests)
    assert "- seven" in text and all(f"question {n}?" in text for n in (0, 1, 3, 4, 5))


def test_hub_token_stays_here(endpoint):
    server = endpoint(_by_answer)
    ask(server.url, ["right"], api_key_variable="NO_SUCH_VARIABLE")
    assert server.keys == {"Bearer none"}


def test_endpoint_trouble_is_tried_again(endpoint):
    replies = [503, 429, "Hm.", "Yes"]
    server = endpoint(lambda body, number: replies[number - 1])
    assert ask(server.url, ["right"]) == [True]


@pytest.mark.parametrize(
    ("reply", "requests", "message"),
    [
        (503, 4, "judge 'judge' at http.*is not available.*Run the stage again"),
        (401, 1, "refuses requests.*OPENAI_API_KEY"),
        ("Perhaps", 4, "gave no verdict on 'right' as an answer to 'question 0.' but 'Perhaps'"),
    ],
)
def test_endpoint_that_does_not_work(endpoint, reply, requests, message):
    server = endpoint(lambda body, number: reply)
    with pytest.raises(ValueError, match=message):
        ask(server.url, ["right"])
    assert len(server.requests) == requests


def test_nobody_at_the_endpoint(endpoint):
    server = endpoint(_by_answer)
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(ValueError, match="cannot be reached"):
        ask(server.url, ["right"])


def test_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        ask("http://127.0.0.1:9/v1", ["right"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("**No**, because yes", False),
        (" yes.", True),
        ("<think>No? Yes!</think>\nNo", False),
        ("Not sure", None),
        ("I say yes", None),
        ("", None),
    ],
)
def test_parse_verdict(text, expected):
    assert parse_verdict(text) is expected


# --- the VLM itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_self_judge_reads_the_likelier_word(family, monkeypatch):
    model, processor = shared_model(family), PROCESSORS[family]()
    judge = judge_for(JudgeConfig(kind="self"), Session(model, processor, ModelConfig()))
    questions = ["short?", "a question that is a good deal longer?", "colour?", "how many?", "where is it?"]
    truths, answers = [("red", "crimson"), ("7",), ("a",), ("b",), ("c",)], ["red", "eight of them", " ", "b", "there"]

    margins = []
    for row in zip(questions, truths, answers):
        text = processor.apply_chat_template(judge_messages(*row), add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([processor.tokenizer(text).input_ids])
        with torch.no_grad():
            logits = model.vlm(input_ids=ids).logits[0, -1]
        yes, no = (max(logits[processor.tokenizer(word).input_ids[-1]] for word in words) for words in ("Yy", "Nn"))
        margins.append(float(yes - no))
    expected = [margin > 0 for margin in margins]
    expected[2] = False  # an empty answer
    monkeypatch.setattr(judges, "_SELF_BATCH", 2)
    assert judge.judge(questions, truths, answers) == expected
    # a model that prefers No by a little less says Yes to everything but the empty answer
    shift = 1e-3 - min(margins)
    original = model.vlm.forward

    def shifted(*args, **kwargs):
        output = original(*args, **kwargs)
        for letter in "Yy":
            output.logits[..., processor.tokenizer(letter).input_ids[-1]] += shift
        return output

    monkeypatch.setattr(model.vlm, "forward", shifted)
    assert judge.judge(questions, truths, answers) == [True, True, False, True, True]


def test_self_judge_needs_the_words():
    class Mute:
        unk_token_id = 0

        def __call__(self, text, add_special_tokens):
            return type("Ids", (), {"input_ids": [0]})

    processor = type("Processor", (), {"tokenizer": Mute()})
    with pytest.raises(ValueError, match="knows the words Yes and No"):
        judge_for(JudgeConfig(kind="self"), Session(None, processor, ModelConfig()))
