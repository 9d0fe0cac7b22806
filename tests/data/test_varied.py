"""Varied pages: other fonts, colours, scans and kinds, with answers and boxes that are on the page all the same."""

import dataclasses
import random
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from modeling_qzoom.data.config import DataConfig
from modeling_qzoom.data.drawn import fonts, pages
from modeling_qzoom.data.drawn.fonts import TYPEFACES, load_font, typefaces_of
from modeling_qzoom.data.drawn.looks import LETTERS, Look
from modeling_qzoom.data.drawn.pages import PAGE_SETTINGS, SPLITS, Entry, Page, PageSettings
from modeling_qzoom.data.drawn.questions import (
    ABSENT,
    QUESTION_KINDS,
    VARIED_KINDS,
    ask_question,
    coarse_questions,
    code_question,
    draw_page,
    draw_rows,
    question_corpus,
)
from modeling_qzoom.data.drawn.scans import turned_page
from modeling_qzoom.data.readers import load_rows


# what the development environment has; the font packages are an extra
HERE = ("DejaVu Sans", "DejaVu Serif", "Aileron", "STIX General", "DejaVu Sans Mono")
# smaller pages, in larger print
VARIED = PageSettings((800, 1000), digit_width=(1 / 66, 1 / 58), variety="varied", typefaces=HERE)
LETTERED = dataclasses.replace(VARIED, codes="letters")
TINY = (300, 320)
EVERY_PAGE = [(kind, split, seed) for kind in VARIED_KINDS for split in ("test", "shifted") for seed in range(2)]
# drawn before there were varied pages
PLAIN_SIZE = (1230, 1166)
PLAIN_SCENE = [
    ("red triangle", "317", (124, 132, 354, 209)),
    ("blue diamond", "648", (557, 587, 637, 614)),
    ("red diamond", "406", (593, 958, 672, 985)),
]
PLAIN_FORM = [("level", "855", (681, 193, 755, 218)), ("price", "714", (591, 406, 664, 431))]


def pixels(page: Page) -> np.ndarray:
    return np.asarray(page.image).astype(int)


def test_plain_pages_stay_what_they_were() -> None:
    """The published figures and the shipped checkpoint depend on these pages."""
    page = draw_page(3, kind="scene", split="test")
    found = [(entry.name, entry.code, entry.code_box) for entry in page.entries]
    assert found == PLAIN_SCENE
    assert page.image.size == PLAIN_SIZE
    form = draw_page(3, kind="form", split="train")
    assert [(entry.word, entry.code, entry.code_box) for entry in form.entries] == PLAIN_FORM


@pytest.mark.parametrize("kind", VARIED_KINDS)
def test_a_seed_gives_one_page(kind: str) -> None:
    first, second = draw_page(7, VARIED, kind), draw_page(7, VARIED, kind)
    assert np.array_equal(pixels(first), pixels(second))
    assert first.entries == second.entries and first.kind == kind
    assert first.entries != draw_page(8, VARIED, kind).entries


@pytest.mark.parametrize("settings", [VARIED, LETTERED], ids=["digits", "letters"])
@pytest.mark.parametrize(("kind", "split", "seed"), EVERY_PAGE)
def test_boxes_lie_on_the_page_and_hold_their_code(kind: str, split: str, seed: int, settings: PageSettings) -> None:
    page = draw_page(seed, settings, kind, split)
    width, height = page.image.size
    image = pixels(page).sum(-1)
    for entry in page.entries:
        for box in (entry.box, entry.code_box, entry.mark, entry.line, *entry.digit_boxes):
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height, (entry.name, box)
        x0, y0, x1, y1 = entry.code_box
        for outer in (entry.box, entry.line):
            assert outer[0] <= x0 and outer[1] <= y0 and outer[2] >= x1 and outer[3] >= y1
        assert len(entry.digit_boxes) == len(entry.code)
        for character, (left, top, right, bottom) in zip(entry.code, entry.digit_boxes, strict=True):
            part = image[top:bottom, left:right]
            assert part.max() - part.min() > (60 if character == "-" else 150), (entry.code, character)


def test_codes_do_not_touch_other_entries() -> None:
    for kind in VARIED_KINDS:
        for seed in range(6):
            entries = draw_page(seed, LETTERED, kind).entries
            boxes = [entry.code_box for entry in entries]
            marks = [entry.mark for entry in entries] if kind != "scene" else []
            for place, one in enumerate(boxes):
                for two in boxes[:place] + boxes[place + 1 :] + marks:
                    apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
                    # turned boxes of neighbours may share a few pixels at a corner
                    overlap = min(one[3], two[3]) - max(one[1], two[1])
                    assert apart or overlap <= 4, (kind, seed, one, two)


@pytest.mark.parametrize("degrees", [-2.0, 0.7, 2.0])
def test_boxes_follow_a_turned_page(degrees: float) -> None:
    image, box = Image.new("RGB", (900, 700), "white"), (620, 40, 740, 64)
    ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill="black")
    entry = Entry("total", "1", box, (box,), 10.0, box, box, box, word="total")
    turned = turned_page(Page("form", image, (entry,), (box, "red")), degrees, (255, 255, 255))
    ys, xs = np.nonzero(np.asarray(turned.image.convert("L")) < 128)
    ink = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    found = turned.entries[0]
    for moved in (found.code_box, found.mark, found.line, found.box, found.digit_boxes[0], turned.bar[0]):
        assert np.abs(np.subtract(moved, ink)).max() <= 2
    assert np.abs(np.subtract(ink, box)).max() > 3  # it was turned


def test_test_pages_have_layouts_that_training_never_shows() -> None:
    settings = dataclasses.replace(VARIED, side=TINY)
    for kind in ("table", "columns", "sizes"):
        found = {}
        for split in ("train", "validation", "test"):
            drawn = [draw_page(seed, settings, kind, split) for seed in range(12)]
            # a table has two layouts, each with its own share of the pairs of first labels
            found[split] = {tuple(entry.word for entry in page.entries[:2]) for page in drawn}
        if kind != "table":
            assert not found["train"] & found["test"] and not found["train"] & found["validation"]
        assert len(found["test"]) > 5


def test_typefaces_of_shifted_pages_are_not_trained_on() -> None:
    train, shifted = typefaces_of("train"), typefaces_of("shifted")
    assert len(train) >= 10 and len(shifted) >= 4 and not set(train) & set(shifted)
    assert train == typefaces_of("validation") == typefaces_of("test")
    for name in TYPEFACES:
        assert f"| {name}" in fonts.__doc__  # with its licence


def test_split_decides_the_typeface(monkeypatch) -> None:
    used: dict[str, set] = {}
    settings = dataclasses.replace(PAGE_SETTINGS["varied"], side=TINY)
    stand_in = load_font(None, 20)
    for split in SPLITS:
        names = used.setdefault(split, set())
        monkeypatch.setattr(pages, "load_font", lambda name, size, names=names: names.add(name) or stand_in)
        monkeypatch.setattr(Look, "font_size", lambda self, width: 20)
        monkeypatch.setattr("modeling_qzoom.data.drawn.looks.digit_shape", lambda name: (0.57, 0.7))
        for seed in range(12):
            draw_page(seed, settings, "form", split)
    for split, names in used.items():
        allowed = {font for name in typefaces_of(split) for font in TYPEFACES[name].fonts}
        assert names <= allowed and len(names) > 2


def test_a_missing_font_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr(fonts, "find_spec", lambda name: None)
    fonts.load_font.cache_clear()
    with pytest.raises(ImportError, match=r"font-lato is missing: pip install 'qzoom\[pages\]'"):
        load_font("font_lato/Lato-Regular.ttf", 20)


def test_codes_with_letters_have_letters() -> None:
    codes = [entry.code for seed in range(12) for entry in draw_page(seed, LETTERED, "table").entries]
    assert all(
        re.fullmatch(f"[{LETTERS}][0-9]-[0-9]{{3}}|[{LETTERS}][0-9]{{2}}|[0-9]{{2}}[{LETTERS}0-9]", c) for c in codes
    )
    assert {len(code) for code in codes} == {3, 6}
    assert any("-" in code for code in codes) and not any(set(code) & set("IOQ") for code in codes)


@pytest.mark.parametrize(("kind", "split", "seed"), EVERY_PAGE)
def test_questions_agree_with_the_page(kind: str, split: str, seed: int) -> None:
    page, rng = draw_page(seed, LETTERED, kind, split), random.Random(seed)
    words = {word for text in question_corpus() for word in text.split()}
    known = words | {word.replace("number", "code") for word in words}
    for question in [ask_question(page, asked, rng) for asked in QUESTION_KINDS for _ in range(4)]:
        codes = [page.entries[index].code for index in question.items]
        assert set(question.text.split()) <= known  # a trained tokenizer has the words
        if question.kind == "fine":
            assert question.answer == codes[0] and question.box == page.entries[question.items[0]].code_box
        elif question.kind == "multi":
            assert question.answer.split() == codes and len(set(question.items)) == 2
        elif question.kind == "absent":
            assert question.answer == ABSENT and not any(entry.name in question.text for entry in page.entries)
    assert len({question.text for question in coarse_questions(page)}) == len(coarse_questions(page))


def test_wording_does_not_tell_whether_mixed_print_is_legible() -> None:
    kinds: dict[str, set[str]] = {}
    for seed in range(30):
        page = draw_page(seed, VARIED, "sizes")
        assert any(not entry.large for entry in page.entries)
        for index in range(len(page.entries)):
            question = code_question(page, index, random.Random(0))
            kinds.setdefault(question.text, set()).add(question.kind)
    assert sum(found == {"fine", "coarse"} for found in kinds.values()) > 5


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no variety 'odd'"):
        PageSettings(variety="odd")
    with pytest.raises(ValueError, match="set variety='varied'"):
        PageSettings(codes="letters")
    with pytest.raises(ValueError, match="typefaces must name some of"):
        PageSettings(variety="varied", typefaces=("Comic",))
    with pytest.raises(ValueError, match="no kind of page 'table' among plain ones"):
        draw_page(1, kind="table")
    with pytest.raises(ValueError, match="no pages 'odd'"):
        load_rows(DataConfig(data="drawn:train/odd"))


def test_rows_of_varied_pages_have_names_of_their_own(monkeypatch) -> None:
    monkeypatch.setitem(PAGE_SETTINGS, "varied", VARIED)
    rows = load_rows(DataConfig(data="drawn:train/varied", limit=8))
    plain = load_rows(DataConfig(data="drawn:train", limit=8))
    assert rows.fingerprint != plain.fingerprint and not {row.id for row in rows} & {row.id for row in plain}
    image = rows[0].load_image()
    assert rows[0].box is not None and rows[0].box[2] <= image.width
    assert [row.page.kind for row in draw_rows("test", 1, 6, ("fine",), VARIED)] == list(VARIED_KINDS)
