"""Answers over HTTP against `generate` alone, with the official client."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.serving.loopback import NAME, alone, body, client, data_url, pages, question, serving


@pytest.fixture(scope="module")
def served():
    with serving() as (address, worker):
        yield address, worker


@pytest.fixture(scope="module")
def openai(served):
    return client(served[0])


def ask(openai, messages, **fields):
    extra = {name: fields.pop(name) for name in ("zoom",) if name in fields}
    return openai.chat.completions.create(**body(messages, **fields), extra_body=extra)


def one(image: Image.Image, text: str, **options):
    return alone([("user", [{"type": "image"}, {"type": "text", "text": text}])], [image], **options)


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_an_answer_is_that_of_generate(openai, mode) -> None:
    for image, text in pages(4):
        expected, report = one(image, text, zoom=mode)
        got = ask(openai, question(text, image), zoom={"zoom": mode, "report": True})
        assert got.choices[0].message.content == expected
        told = got.zoom_reports[0]
        assert (told["reason"], told["zoomed"]) == (report.reason, report.zoomed)
        assert told["box"] == (None if report.box is None else list(report.box))
        assert told["options"]["zoom"] == mode and told["choice"] == 0
        visual = got.usage.prompt_tokens_details.model_extra
        assert visual["crop_tokens"] == report.crop_tokens
        assert visual["visual_tokens"] == report.coarse_tokens + report.crop_tokens
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_mixed_requests_at_once_get_their_own_answers(openai) -> None:
    """Rows that zoom, skip, have no image or several, and other options, some of them in one batch."""
    (first, text), (second, other) = pages(8)[0], pages(8)[5]
    system = [{"role": "system", "content": "be short"}]
    turns = [{"role": "assistant", "content": "12"}, {"role": "user", "content": other}]
    asked = [
        (question(text, first), {}),
        (question(other, second), {"zoom": {"zoom": "always", "crop_max_tokens": 36}}),
        (question(other, first, second), {}),
        ([{"role": "user", "content": "hello"}], {}),
        (system + question(text, second) + turns, {}),
        (question(text, second), {"zoom": {"zoom": "never"}}),
        (question(text, second), {"zoom": {"min_tokens": 16, "max_tokens": 16}}),
    ]
    plain = [ask(openai, messages, **fields).choices[0].message.content for messages, fields in asked]
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    several = [("system", [{"type": "text", "text": "be short"}]), ("user", parts)]
    several += [("assistant", [{"type": "text", "text": "12"}]), ("user", [{"type": "text", "text": other}])]
    assert plain[0] == one(first, text)[0]
    assert plain[1] == one(second, other, zoom="always", crop_max_tokens=36)[0]
    assert plain[2] == alone([("user", [parts[0], parts[0], {"type": "text", "text": other}])], [first, second])[0]
    assert plain[4] == alone(several, [second])[0]
    with ThreadPoolExecutor(14) as pool:
        answers = list(pool.map(lambda each: ask(openai, each[0], **each[1]), asked * 4))
    assert [answer.choices[0].message.content for answer in answers] == plain * 4
    assert len({answer.id for answer in answers}) == len(answers)


def test_a_stream_says_what_the_whole_answer_says(openai) -> None:
    image, text = pages(4)[0]
    whole = ask(openai, question(text, image), n=2, zoom={"report": True})
    pieces = list(
        ask(
            openai,
            question(text, image),
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            zoom={"report": True},
        )
    )
    said, ends = ["", ""], {}
    for piece in pieces:
        for choice in piece.choices:
            said[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert said == [choice.message.content for choice in whole.choices]
    assert [ends[0], ends[1]] == [choice.finish_reason for choice in whole.choices]
    assert pieces[-1].usage == whole.usage and pieces[-1].zoom_reports == whole.zoom_reports
    assert {piece.id for piece in pieces} == {pieces[0].id} and all(piece.usage is None for piece in pieces[:-1])
    assert len(pieces) > 6  # words came one by one


def test_a_seed_repeats_an_answer_in_any_company(openai) -> None:
    image, text = pages(4)[1]
    drawn = {"temperature": 2.0, "seed": 7, "n": 3}

    def texts(fields):
        return [choice.message.content for choice in ask(openai, question(text, image), **fields).choices]

    with ThreadPoolExecutor(6) as pool:
        same, other = list(pool.map(texts, [drawn] * 3)), texts({**drawn, "seed": 8})
    assert same[0] == same[1] == same[2] and len(set(same[0])) > 1
    assert other[:2] == same[0][1:] and other != same[0]  # choice i is drawn with seed + i
    assert len(set(texts({**drawn, "temperature": 0}))) == 1
    cold = ask(openai, question(text, image), temperature=2.0, top_p=1e-6).choices[0].message.content
    assert cold == ask(openai, question(text, image)).choices[0].message.content


def test_stop_texts_and_length_end_an_answer(openai) -> None:
    hello = [{"role": "user", "content": "hello"}]
    whole = ask(openai, hello).choices[0]
    assert whole.finish_reason == "length" and len(whole.message.content) > 6
    stop = whole.message.content[4:6]
    cut = ask(openai, hello, stop=[stop, "zzz"]).choices[0]
    assert cut.message.content == whole.message.content.partition(stop)[0] and cut.finish_reason == "stop"
    streamed = "".join(
        choice.delta.content or "" for piece in ask(openai, hello, stop=stop, stream=True) for choice in piece.choices
    )
    assert streamed == cut.message.content
    short = ask(openai, hello, max_tokens=None, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3 and whole.message.content.startswith(short.choices[0].message.content)


def test_the_overlay_comes_as_a_picture(openai) -> None:
    image, text = pages(4)[0]
    got = ask(openai, question(text, image), zoom={"zoom": "always", "overlay": True})
    head, _, picture = got.zoom_reports[0]["overlay"].partition(",")
    drawn = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert head == "data:image/png;base64" and drawn.size[0] > 384
    never = ask(openai, question(text, image), zoom={"zoom": "never", "overlay": True})
    assert never.zoom_reports[0]["reason"] == "off" and never.zoom_reports[0]["overlay"].startswith(head)
    nothing = ask(openai, [{"role": "user", "content": "hello"}], zoom={"overlay": True})
    assert nothing.zoom_reports[0]["reason"] == "no_image" and "overlay" not in nothing.zoom_reports[0]
    assert "zoom_reports" not in ask(openai, question(text, image)).model_extra


def test_what_clients_send_without_asking_for_anything_is_taken(openai) -> None:
    image, text = pages(4)[0]
    messages = question(text, image)
    first = openai.chat.completions.create(**body(messages))
    fields = {"logprobs": False, "presence_penalty": 0, "tools": [], "user": "someone", "metadata": {"a": "b"}}
    messages += [first.choices[0].message.model_dump(), {"role": "user", "content": text}]
    messages[0]["content"][0]["image_url"]["detail"] = "auto"
    again = openai.chat.completions.create(**body([{"role": "developer", "content": "be short"}, *messages], **fields))
    assert again.choices[0].finish_reason in ("stop", "length")


def test_the_model_is_listed(openai) -> None:
    assert [model.id for model in openai.models.list()] == [NAME]
    assert openai.models.retrieve(NAME).id == NAME


def test_an_image_of_another_format(openai) -> None:
    image, text = pages(4)[0]
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    url = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    answers = [ask(openai, question(text, source)).choices[0].message.content for source in (url, data_url(image))]
    assert answers[0] == answers[1]
