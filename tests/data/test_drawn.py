"""Drawn pages: a function of split and seed, with answers and boxes that are on the page."""

import itertools
import random

import numpy as np
import pytest

from modeling_qzoom.data.drawn.pages import COLORS, SPLITS, Entry, Page, PageSettings, layout_of_split
from modeling_qzoom.data.drawn.questions import (
    ABSENT,
    FINE_QUESTIONS,
    PAGE_KINDS,
    QUESTION_KINDS,
    ask_question,
    coarse_questions,
    code_question,
    draw_page,
    draw_rows,
    question_corpus,
)


EVERY_PAGE = [(kind, split, seed) for kind in PAGE_KINDS for split in SPLITS for seed in range(4)]


def pixels(page: Page) -> np.ndarray:
    return np.asarray(page.image).astype(int)


def questions_of(page: Page, count: int = 6) -> list:
    """Some questions of every kind."""
    rng = random.Random(0)
    return [ask_question(page, kind, rng) for kind in QUESTION_KINDS for _ in range(count)]


@pytest.mark.parametrize("kind", PAGE_KINDS)
def test_a_seed_gives_one_page(kind: str) -> None:
    first, second, other = draw_page(7, kind=kind), draw_page(7, kind=kind), draw_page(8, kind=kind)
    assert np.array_equal(pixels(first), pixels(second))
    assert (first.entries, first.bar, first.absent) == (second.entries, second.bar, second.absent)
    assert questions_of(first) == questions_of(second)
    assert first.entries != other.entries
    assert first.kind == kind
    assert draw_page(7).kind == draw_page(7).kind


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no split 'dev'"):
        draw_page(1, split="dev")
    with pytest.raises(ValueError, match="no kind of page 'poem'"):
        draw_page(1, kind="poem")
    with pytest.raises(ValueError, match="no kind of question 'odd'"):
        ask_question(draw_page(1), "odd", random.Random(0))


@pytest.mark.parametrize(("kind", "split", "seed"), EVERY_PAGE)
def test_boxes_lie_on_the_page_and_hold_their_code(kind: str, split: str, seed: int) -> None:
    page = draw_page(seed, kind=kind, split=split)
    width, height = page.image.size
    image = pixels(page)
    assert 2 <= len(page.entries) <= 7
    for entry in page.entries:
        for box in (entry.box, entry.code_box, entry.mark, entry.line):
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height, (entry.name, box)
        x0, y0, x1, y1 = entry.code_box
        for outer in (entry.box, entry.line):
            assert outer[0] <= x0 and outer[1] <= y0 and outer[2] >= x1 and outer[3] >= y1
        for left, top, right, bottom in entry.digit_boxes:
            assert image[top:bottom, left:right].min() < 130  # ink in every digit's box
        # the ink ends about where the box does: other fonts may leave it by a pixel
        ink = image[y0 - 4 : y1 + 4, x0:x1].max(-1) < 100
        assert ink[4:-4].sum() > 0.95 * ink.sum() > 0
        assert image[(y0 + y1) // 2, x0 - 2].min() > 180
    boxes = [entry.code_box for entry in page.entries]
    for one, two in itertools.combinations(boxes, 2):
        assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]


def test_shapes_have_their_colour() -> None:
    for seed in range(6):
        page = draw_page(seed, kind="scene")
        assert len({(entry.color, entry.shape) for entry in page.entries}) == len(page.entries)
        for entry in page.entries:
            x0, y0, x1, y1 = entry.mark
            near = np.abs(pixels(page)[y0:y1, x0:x1] - COLORS[entry.color]).max(-1) <= 14
            assert near.mean() > 0.1


@pytest.mark.parametrize("kind", ["form", "text"])
def test_labels_are_printed_where_the_mark_is(kind: str) -> None:
    for seed in range(6):
        page = draw_page(seed, kind=kind)
        assert len({entry.word for entry in page.entries}) == len(page.entries)
        assert not {entry.word for entry in page.entries} & set(page.absent)
        box, color = page.bar
        middle = pixels(page)[(box[1] + box[3]) // 2, (box[0] + box[2]) // 2]
        assert np.abs(middle - COLORS[color]).max() <= 14
        for entry in page.entries:
            x0, y0, x1, y1 = entry.mark
            assert pixels(page)[y0:y1, x0:x1].min() < 60


@pytest.mark.parametrize(("kind", "split", "seed"), EVERY_PAGE)
def test_a_coarse_question_has_one_answer(kind: str, split: str, seed: int) -> None:
    page = draw_page(seed, kind=kind, split=split)
    questions = coarse_questions(page)
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        assert question.kind == "coarse" and question.answer == true_answer(page, question.text)


def true_answer(page: Page, text: str) -> str:
    """The answer read off the page's entries, by other means than the asking code; fails where there are several."""
    words = text.rstrip("?.").split()
    if text.startswith("how many"):
        return str(len(page.entries))
    if text == "what color is the bar?":
        return page.bar[1]
    if text.startswith("which word"):
        # in reading order: row by row, where a row is what overlaps in height
        def place(entry: Entry) -> tuple[int, int]:
            middle = (entry.mark[1] + entry.mark[3]) / 2
            return sum(other.mark[3] < middle for other in page.entries), entry.mark[0]

        return sorted(page.entries, key=place)[0 if words[-1] == "first" else -1].word
    if text.startswith("where is the"):
        (entry,) = [entry for entry in page.entries if entry.name == " ".join(words[-2:])]
        x, y = (entry.mark[0] + entry.mark[2]) / 2, (entry.mark[1] + entry.mark[3]) / 2
        down = ["top", "middle", "bottom"][int(3 * y / page.image.height)]
        return f"{down} {['left', 'center', 'right'][int(3 * x / page.image.width)]}"
    named = "color" if text.startswith("what color") else "shape"
    (entry,) = [entry for entry in page.entries if words[-1] in (entry.color, entry.shape)]
    return getattr(entry, named)


@pytest.mark.parametrize(("kind", "split", "seed"), EVERY_PAGE)
def test_other_questions_agree_with_the_page(kind: str, split: str, seed: int) -> None:
    page = draw_page(seed, kind=kind, split=split)
    for question in questions_of(page):
        codes = [page.entries[index].code for index in question.items]
        if question.kind == "fine":
            assert question.answer == codes[0] and question.box == page.entries[question.items[0]].code_box
            assert not page.entries[question.items[0]].large
        elif question.kind == "multi":
            assert question.answer.split() == codes and len(set(question.items)) == 2
            first, second = (page.entries[index].name for index in question.items)
            assert 0 < question.text.index(first) < question.text.rindex(second)
        elif question.kind == "absent":
            assert question.answer == ABSENT and question.items == ()
            assert not any(entry.name in question.text for entry in page.entries)
            assert any(name in question.text for name in page.absent)
    for index, entry in enumerate(page.entries):
        question = code_question(page, index, random.Random(index))
        others = [other.name for other in page.entries if other is not entry]
        assert entry.name in question.text and not any(name in question.text.split() for name in others)
        assert question.kind == ("coarse" if entry.large else "fine")


def test_codes_are_lost_in_the_coarse_view_and_kept_at_full_size() -> None:
    for kind in PAGE_KINDS:
        page = draw_page(11, kind=kind)
        for entry in page.entries:
            coarse = entry.digit_width / max(page.image.size) * 224
            assert (coarse > 8) if entry.large else (coarse < 4)
            assert entry.digit_width > 14


def signature(page: Page) -> object:
    """What the split of a scene depends on: which cells of the grid hold shapes."""
    width, height = page.image.width / 3, page.image.height / 3
    cells = []
    for entry in page.entries:
        x, y = (entry.code_box[0] + entry.code_box[2]) / 2, (entry.code_box[1] + entry.code_box[3]) / 2
        cells.append(int(y // height) * 3 + int(x // width))
    return ("scene", sorted(cells))


def test_splits_differ_by_seed_and_layout() -> None:
    layouts = {}
    for split in ("train", "validation", "test"):
        pages = [draw_page(seed, kind="scene", split=split) for seed in range(25)]
        layouts[split] = {str(signature(page)) for page in pages}
        assert all(layout_of_split(signature(page), split) for page in pages)
    for one, two in itertools.combinations(layouts.values(), 2):
        assert not one & two
    for kind in PAGE_KINDS:
        codes = {split: [entry.code for entry in draw_page(3, kind=kind, split=split).entries] for split in SPLITS}
        assert len({tuple(found) for found in codes.values()}) == len(SPLITS)


@pytest.mark.parametrize("kind", ["form", "text"])
def test_labels_tell_splits_apart(kind: str) -> None:
    """The two first labels of a layout belong to one split."""

    def pairs(split: str) -> set[tuple]:
        pages = [draw_page(seed, kind=kind, split=split) for seed in range(25)]
        return {tuple(entry.word for entry in page.entries[:2]) for page in pages}

    found = {split: pairs(split) for split in ("train", "validation", "test")}
    if kind == "text":  # forms have two layouts, each with its own share of the pairs
        for one, two in itertools.combinations(found.values(), 2):
            assert not one & two
    assert len(found["test"]) > 5


def test_shifted_pages_use_fonts_that_training_never_shows(monkeypatch) -> None:
    import modeling_qzoom.data.drawn.pages as pages

    used: dict[str, set] = {}
    original = pages.load_font
    for split in SPLITS:
        names = used.setdefault(split, set())

        def record(name, size, names=names):
            names.add(name)
            return original(name, size)

        monkeypatch.setattr(pages, "load_font", record)
        for seed in range(12):
            draw_page(seed, kind=PAGE_KINDS[seed % 3], split=split)
    assert used["train"] == used["validation"] == used["test"] == {None}
    assert len(used["shifted"]) > 1 and None not in used["shifted"]


def test_shifted_pages_without_matplotlib_say_what_to_install(monkeypatch) -> None:
    import modeling_qzoom.data.drawn.pages as pages

    pages.load_font.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'qzoom\[stages\]'"):
        draw_page(1, kind="form", split="shifted")


def test_rows_take_turns_and_begin_alike() -> None:
    rows = list(draw_rows("test", 5, 12))
    assert [row.question.kind for row in rows] == ["fine", "coarse"] * 6
    assert [row.page.kind for row in rows] == [kind for kind in PAGE_KINDS for _ in range(2)] * 2
    again = list(draw_rows("test", 5, 3))
    assert [row.question for row in again] == [row.question for row in rows[:3]]
    assert np.array_equal(pixels(again[2].page), pixels(rows[2].page))
    other = list(draw_rows("test", 6, 12))
    assert not {row.question.box for row in rows if row.question.kind == "fine"} & {
        row.question.box for row in other if row.question.kind == "fine"
    }
    assert [row.question.kind for row in draw_rows("test", 5, 3, ("multi",))] == ["multi"] * 3


def test_rows_are_drawn_one_by_one(monkeypatch) -> None:
    import modeling_qzoom.data.drawn.questions as synthetic

    drawn, original = [], synthetic.draw_page
    monkeypatch.setattr(synthetic, "draw_page", lambda *args: drawn.append(args) or original(*args))
    rows = draw_rows("test", 1, 10**6)
    next(rows), next(rows)
    assert len(drawn) == 2


def test_settings_bound_the_page() -> None:
    settings = PageSettings(
        side=(600, 620), aspect=(1.0, 1.0), items=(3, 3), digit_width=(0.02, 0.02), large_share=0.0
    )
    for kind in PAGE_KINDS:
        page = draw_page(5, settings, kind)
        assert 600 <= page.image.size[0] == page.image.size[1] <= 620
        assert len(page.entries) == 3
        assert all(entry.digit_width == pytest.approx(0.02 * page.image.size[0]) for entry in page.entries)
        assert not any(entry.large for entry in page.entries)


def test_the_corpus_covers_every_question_and_answer() -> None:
    corpus = set(question_corpus())
    for kind in PAGE_KINDS:
        assert len(FINE_QUESTIONS[kind]) == 3
        for seed in range(8):
            page = draw_page(seed, kind=kind)
            for question in (*questions_of(page), *coarse_questions(page)):
                # a question about two names occurs in the corpus with one name twice
                known = question.text in corpus or question.kind == "multi"
                assert known, question.text
                assert question.answer in corpus or set(question.answer) <= set("0123456789 "), question.answer
    words = {word for text in corpus for word in text.split()}
    assert all(set(q.text.split()) <= words for s in range(8) for q in questions_of(draw_page(s)) if q.kind == "multi")
