"""What a request may hold: the field at fault is named, and nothing is passed over in silence."""

import json

import pytest

from hub_release.measure.serving.fuzz import fuzz
from modeling_qzoom.serving.errors import RequestFailed
from modeling_qzoom.serving.schema import parse_request
from tests.serving.loopback import body, client, pages, question, serving


GOOD = {"model": "qzoom-demo", "messages": [{"role": "user", "content": "hello"}]}
PICTURE = {"type": "image_url", "image_url": {"url": "data:,", "detail": "high"}}


def refusal(content) -> tuple[str, str | None]:
    with pytest.raises(RequestFailed) as caught:
        parse_request(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert caught.value.failure.status == 400
    return caught.value.failure.message, caught.value.failure.param


@pytest.mark.parametrize(
    "fields, message, param",
    [
        ({"zoomm": {}}, "did you mean zoom?", "zoomm"),
        ({"zoom": {"crop_max_token": 4}}, "did you mean crop_max_tokens?", "zoom.crop_max_token"),
        ({"logprobs": True}, "logprobs is not supported by this server; leave it out", None),
        ({"tools": [{}]}, "tools is not supported", None),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported", None),
        ({"temperature": 2.5}, "less than or equal to 2, got 2.5", "temperature"),
        ({"n": 0}, "greater than or equal to 1", "n"),
        ({"max_tokens": "4"}, "valid integer, got '4'", "max_tokens"),
        ({"stop": ["a"] * 5}, "at most 4 items", "stop"),
        ({"messages": []}, "at least 1 item", "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "'system', 'developer', 'user', 'assistant'", "messages.0"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "'auto', got 'high'", "messages.0.content.0.image"),
        ({"messages": [{"role": "user", "content": []}]}, "at least 1 item", "messages.0.content"),
    ],
)
def test_the_field_at_fault_is_named(fields, message, param) -> None:
    said, where = refusal({**GOOD, **fields})
    assert message in said and (where or "").startswith(param or "")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"[]", b"3"])
def test_what_is_no_request_is_refused(content) -> None:
    assert refusal(content)[0]


def test_nulls_and_values_that_ask_for_nothing_are_taken() -> None:
    request = parse_request(
        json.dumps({**GOOD, "n": None, "zoom": None, "tools": None, "tool_choice": "none", "logit_bias": {}}).encode()
    )
    assert request.n == 1 and request.zoom.report is False


@pytest.fixture(scope="module")
def served():
    with serving(max_images=2, max_choices=3, max_visual_tokens=500, max_body_mib=2, max_pixels=4_000_000) as entry:
        yield entry


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": "gpt-4"}, "there is no model 'gpt-4' here; the model of this server is 'qzoom-demo'"),
        ({"n": 4}, "n: 4 is more than this server grants (3)"),
        ({"max_tokens": 65}, "max_tokens: 65 is more than this server grants (64)"),
        ({"max_completion_tokens": 4}, "two names of one limit"),
        ({"stream_options": {"include_usage": True}}, "stream_options belong to streams"),
        ({"stop": [""]}, "stop holds an empty text"),
        ({"zoom": {"zoom": "sometimes"}}, "zoom must be one of"),
        ({"zoom": {"effort": "huge"}}, "effort='huge' is not a preset of this checkpoint"),
        ({"zoom": {"max_tokens": 501}}, "zoom.max_tokens: 501 tokens are more than this server grants (500)"),
        ({"zoom": {"min_tokens": 9, "max_tokens": 4}}, "zoom.min_tokens (9) is larger than zoom.max_tokens (4)"),
        ({"zoom": {"crop_max_tokens": 1.5}}, "zoom.crop_max_tokens must be a positive number"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "last message must"),
        ({"messages": [{"role": "user", "content": "x " * 4000}]}, "this model's sequences hold 4096"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, "1 image placeholder"),
    ],
)
def test_limits_and_options_are_told_in_the_librarys_words(served, fields, message) -> None:
    import openai

    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        fields = {**body(GOOD["messages"]), **fields}
        client(served[0]).chat.completions.create(**{"extra_body": {"zoom": fields.pop("zoom", {})}, **fields})
    assert message in caught.value.body["message"], caught.value.body


@pytest.mark.parametrize(
    "url, message",
    [
        ("file:///etc/passwd", "neither a data URL"),
        ("/etc/passwd", "neither a data URL"),
        ("http://127.0.0.1/a.png", "this server does not fetch images from '127.0.0.1'"),
        ("data:image/png;base64,####", "base64"),
        ("data:,hello", "cannot be read"),
    ],
)
def test_images_that_cannot_be_used(served, url, message) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        client(served[0]).chat.completions.create(**body(question("what?", url)))
    assert message in caught.value.body["message"]


def test_images_that_are_too_many_or_too_large(served) -> None:
    import openai

    page = pages(4)[0][0]
    cases = [([page.resize((40, 40))] * 3, "images: 3"), ([page.resize((2001, 2000))], "4002000 pixels")]
    for images, message in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            client(served[0]).chat.completions.create(**body(question("what?", *images)))
        assert message in caught.value.body["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        client(served[0]).chat.completions.create(**body([{"role": "user", "content": "x" * 2**21}]))
    assert caught.value.status_code == 413 and "larger than 2 MiB" in caught.value.body["message"]


def test_500_malformed_requests_never_fail_on_our_side(served) -> None:
    page = pages(4)[0][0].resize((64, 64))
    good = body(question("what?", page), stop=["x"], n=1, zoom={"zoom": "auto", "report": True})
    told = fuzz(served[0], good, 500)
    assert told["server_errors"] == [] and told["without_message"] == 0 and told["health_afterwards"] == 200
    assert told["statuses"]["400"] > 300
