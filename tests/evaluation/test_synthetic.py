"""Drawn pages: a function of the seed, with answers and boxes that are on the page."""

import numpy as np
import pytest

from modeling_qzoom.evaluation.synthetic import (
    COLORS,
    PageSettings,
    coarse_questions,
    code_question,
    draw_page,
    page_questions,
    question_corpus,
)


def test_a_seed_gives_one_page() -> None:
    first, second, other = draw_page(7), draw_page(7), draw_page(8)
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert first.items == second.items
    assert page_questions(first, 3) == page_questions(second, 3)
    assert first.items != other.items


@pytest.mark.parametrize("seed", range(20))
def test_boxes_lie_on_the_page_and_hold_what_they_say(seed: int) -> None:
    page = draw_page(seed)
    width, height = page.image.size
    pixels = np.asarray(page.image).astype(int)
    assert 2 <= len(page.items) <= 7
    assert len({(item.color, item.shape) for item in page.items}) == len(page.items)
    for item in page.items:
        for box in (item.box, item.code_box):
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
        x0, y0, x1, y1 = item.box
        near = np.abs(pixels[y0:y1, x0:x1] - COLORS[item.color]).max(-1) <= 14
        assert near.mean() > 0.1
        x0, y0, x1, y1 = item.code_box
        assert pixels[y0:y1, x0:x1].min() < 60  # ink inside
        # the ink ends before the plate does: nothing dark just around the code
        assert pixels[y0 - 2 : y0, x0:x1].min() > 150 and pixels[y1 : y1 + 2, x0:x1].min() > 150


@pytest.mark.parametrize("seed", range(20))
def test_questions_have_one_answer(seed: int) -> None:
    page = draw_page(seed)
    for index, item in enumerate(page.items):
        question = code_question(page, index)
        assert (question.answer, question.kind, question.box) == (item.code, "fine", item.code_box)
        assert item.color in question.text and item.shape in question.text
    texts = [question.text for question in coarse_questions(page)]
    assert len(set(texts)) == len(texts)
    for question in coarse_questions(page):
        assert question.kind == "coarse"
        if question.item is None:
            assert question.answer == str(len(page.items))
        else:
            item = page.items[question.item]
            assert question.answer in (item.color, item.shape)
            asked = [other for other in page.items if other.shape in question.text or other.color in question.text]
            assert asked == [item]


def test_codes_are_lost_in_the_coarse_view_and_kept_at_full_size() -> None:
    page = draw_page(11)
    digit = page.digit_width / max(page.image.size) * 224
    assert digit < 4
    assert page.digit_width > 14


def test_settings_bound_the_page() -> None:
    settings = PageSettings(side=(500, 520), aspect=(1.0, 1.0), items=(3, 3), digit_width=(0.04, 0.04))
    page = draw_page(5, settings)
    assert 500 <= page.image.size[0] == page.image.size[1] <= 520
    assert len(page.items) == 3
    assert page.digit_width == pytest.approx(0.04 * page.image.size[0])


def test_the_corpus_covers_every_question() -> None:
    corpus = set(question_corpus())
    for seed in range(10):
        page = draw_page(seed)
        assert {question.text for question in (*page_questions(page, seed), *coarse_questions(page))} <= corpus
