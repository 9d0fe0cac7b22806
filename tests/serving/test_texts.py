"""Text that grows token by token: whole characters, and nothing of a stop text."""

import pytest

from modeling_qzoom.serving.texts import GrowingText
from tests.tiny import qwen_tokenizer


TEXTS = ["plain words", "größer 你好 🙂🙂 end", "aab aaab aaaab", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return qwen_tokenizer()


def grow(tokenizer, text: str, stop=()) -> tuple[str, bool, list[str]]:
    growing = GrowingText(tokenizer, stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(growing.push(token))
        if growing.stopped:
            break
    pieces.append(growing.close())
    assert "".join(pieces) == growing.text
    return growing.text, growing.stopped, pieces


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text(tokenizer, text) -> None:
    said, stopped, pieces = grow(tokenizer, text)
    assert said == text and not stopped and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [("aaaab",), ("b", "aab"), ("你",), ("🙂 e", "zz"), ("end", "n"), ("words and",)])
def test_a_stop_text_ends_it_and_is_not_said(tokenizer, text, stop) -> None:
    found = [entry for entry in stop if entry in text]
    said, stopped, pieces = grow(tokenizer, text, stop)
    assert stopped == bool(found)
    # the one that is whole first, of several the longest
    first = min(found, key=lambda entry: (text.find(entry) + len(entry), text.find(entry)), default="")
    assert said == (text.partition(first)[0] if found else text)


def test_half_a_character_at_the_end_is_told(tokenizer) -> None:
    growing = GrowingText(tokenizer, ())
    ids = tokenizer("ok🙂", add_special_tokens=False).input_ids[:-1]
    said = "".join([growing.push(token) for token in ids]) + growing.close()
    assert said == tokenizer.decode(ids) and said.startswith("ok")
