"""The benchmark: seeded pages with known answers and boxes, their questions and their splits.

Kinds of pages: scenes (`scenes.py`), forms and dense text (`documents.py`); varied pages have tables, columns and
mixed print sizes as well (`sheets.py`). Labels, colours, shapes and their number survive a strong reduction of the
page; the codes do not, except those printed large. Everything is a function of split, seed and settings.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ...zoom_regions_qzoom import Box
from .documents import draw_form, draw_text
from .fonts import TYPEFACES, typefaces_of
from .pages import COLORS, SHAPES, SPLITS, WORDS, Page, PageSettings, Question, Style, blank_page, union
from .scans import scanned_page
from .scenes import draw_scene
from .sheets import draw_columns, draw_sizes, draw_table


PAGE_KINDS = ("scene", "form", "text")
VARIED_KINDS = (*PAGE_KINDS, "table", "columns", "sizes")
QUESTION_KINDS = ("fine", "coarse", "multi", "absent")
ABSENT = "none"
SHIFTED_FONTS = ("DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")

FINE_QUESTIONS = {
    "scene": ("what is the code on the {name}?", "which number is on the {name}?", "read the {name}."),
    "form": ("what is the {name}?", "which number is the {name}?", "read the {name} field."),
    "text": ("what number is in the {name} line?", "which number is beside {name}?", "read the {name} line."),
}
MULTI_QUESTIONS = {
    "scene": "what are the codes on the {first} and the {second}?",
    "form": "what are the {first} and the {second}?",
    "text": "what numbers are in the {first} and {second} lines?",
}
COLOR_QUESTION = "what color is the {shape}?"
SHAPE_QUESTION = "what shape is {color}?"
WHERE_QUESTION = "where is the {name}?"
COUNT_QUESTIONS = {
    "scene": "how many shapes are there?",
    "form": "how many fields are there?",
    "text": "how many lines are there?",
}
WHICH_QUESTIONS = ("which word is first?", "which word is last?")
BAR_QUESTION = "what color is the bar?"

_WORDED_AS = {"table": "form", "columns": "text", "sizes": "form"}
_DRAW = {
    "scene": draw_scene,
    "form": draw_form,
    "text": draw_text,
    "table": draw_table,
    "columns": draw_columns,
    "sizes": draw_sizes,
}


def wording_of(kind: str) -> str:
    """The kind of plain page whose questions a kind of page has: wording does not tell the others."""
    return _WORDED_AS.get(kind, kind)


def page_kinds(settings: PageSettings | None = None) -> tuple[str, ...]:
    """The kinds of pages that there are with some settings."""
    return PAGE_KINDS if settings is None or settings.variety == "plain" else VARIED_KINDS


def _style(rng: random.Random, settings: PageSettings, split: str) -> Style:
    """The fonts of a page; of a varied one, those of one typeface."""
    if settings.variety == "plain":
        return Style(split, SHIFTED_FONTS if split == "shifted" else ())
    return Style(split, TYPEFACES[rng.choice(settings.typefaces or typefaces_of(split))].fonts)


def draw_page(seed: int, settings: PageSettings | None = None, kind: str | None = None, split: str = "train") -> Page:
    """Draw the page of a seed; the same arguments give the same page.

    Args:
        seed: Any whole number.
        settings: The benchmark's own by default.
        kind: One of `page_kinds(settings)`; drawn from the seed by default.
        split: "train", "validation", "test", or "shifted" (other fonts and layouts).

    Raises:
        ValueError: An unknown kind or split.
        ImportError: A font needs a package that is missing: matplotlib for plain `shifted` pages, those of the extra
            `pages` for varied ones.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; there are {list(SPLITS)}.")
    settings = settings or PageSettings()
    kinds = page_kinds(settings)
    is_varied = settings.variety != "plain"
    rng = random.Random(f"varied/{split}/{seed}" if is_varied else f"{split}/{seed}")
    kind = kind or rng.choice(kinds)
    if kind not in kinds:
        raise ValueError(f"There is no kind of page {kind!r} among {settings.variety} ones; there are {list(kinds)}.")
    style = _style(rng, settings, split)
    canvas = blank_page(rng, settings, style)
    page = _DRAW[kind](canvas, settings, style)
    return scanned_page(page, rng, canvas.paper) if is_varied else page


def _whole(page: Page) -> Box:
    return (0, 0, *page.image.size)


def _about_code(page: Page, text: str) -> str:
    """A question as it is put to the page: codes with letters are not called numbers."""
    if all(entry.code.isdigit() for entry in page.entries):
        return text
    return text.replace("numbers", "codes").replace("number", "code")


def code_question(page: Page, index: int, rng: random.Random) -> Question:
    """The question about the code of an entry; coarse where the code is printed large."""
    entry = page.entries[index]
    text = _about_code(page, rng.choice(FINE_QUESTIONS[wording_of(page.kind)]).format(name=entry.name))
    return Question(text, entry.code, "coarse" if entry.large else "fine", entry.code_box, (index,))


def _corner(page: Page, index: int) -> str:
    """Where an entry is, in thirds of the page."""
    x0, y0, x1, y1 = page.entries[index].mark
    across = ("left", "center", "right")[min(2, int(3 * (x0 + x1) / 2 / page.image.width))]
    down = ("top", "middle", "bottom")[min(2, int(3 * (y0 + y1) / 2 / page.image.height))]
    return f"{down} {across}"


def coarse_questions(page: Page) -> list[Question]:
    """Every question that needs no small print and has exactly one answer on the page."""
    whole, entries = _whole(page), page.entries
    questions = [Question(COUNT_QUESTIONS[wording_of(page.kind)], str(len(entries)), "coarse", whole)]
    if page.bar is not None:
        questions.append(Question(BAR_QUESTION, page.bar[1], "coarse", page.bar[0]))
        for text, index in zip(WHICH_QUESTIONS, (0, len(entries) - 1), strict=True):
            questions.append(Question(text, entries[index].name, "coarse", entries[index].mark, (index,)))
        return questions
    colors, shapes = [entry.color for entry in entries], [entry.shape for entry in entries]
    for index, entry in enumerate(entries):
        assert entry.color is not None and entry.shape is not None  # a scene's entries have both
        where = Question(WHERE_QUESTION.format(name=entry.name), _corner(page, index), "coarse", entry.mark, (index,))
        questions.append(where)
        if shapes.count(entry.shape) == 1:
            text = COLOR_QUESTION.format(shape=entry.shape)
            questions.append(Question(text, entry.color, "coarse", entry.mark, (index,)))
        if colors.count(entry.color) == 1:
            text = SHAPE_QUESTION.format(color=entry.color)
            questions.append(Question(text, entry.shape, "coarse", entry.mark, (index,)))
    return questions


def coarse_question(page: Page, rng: random.Random) -> Question:
    """A question that the coarse view answers: of a sort drawn at random, large codes included."""
    large = [index for index, entry in enumerate(page.entries) if entry.large]
    if large and rng.random() < 0.5:
        return code_question(page, rng.choice(large), rng)
    sorts: dict[str, list[Question]] = {}
    for question in coarse_questions(page):
        sorts.setdefault(" ".join(question.text.split()[:2]), []).append(question)
    return rng.choice(sorts[rng.choice(list(sorts))])


def fine_question(page: Page, rng: random.Random) -> Question:
    """A question about a code in small print."""
    return code_question(page, rng.choice([i for i, entry in enumerate(page.entries) if not entry.large]), rng)


def multi_question(page: Page, rng: random.Random) -> Question:
    """A question about two codes; its box holds both."""
    first, second = rng.sample(range(len(page.entries)), 2)
    one, two = page.entries[first], page.entries[second]
    text = _about_code(page, MULTI_QUESTIONS[wording_of(page.kind)].format(first=one.name, second=two.name))
    return Question(text, f"{one.code} {two.code}", "multi", union(one.code_box, two.code_box), (first, second))


def absent_question(page: Page, rng: random.Random) -> Question:
    """A question about something that is not on the page."""
    text = _about_code(page, rng.choice(FINE_QUESTIONS[wording_of(page.kind)]).format(name=rng.choice(page.absent)))
    return Question(text, ABSENT, "absent", _whole(page))


_ASK = {"fine": fine_question, "coarse": coarse_question, "multi": multi_question, "absent": absent_question}


def ask_question(page: Page, kind: str, rng: random.Random) -> Question:
    """A question of a kind about a page.

    Raises:
        ValueError: An unknown kind of question.
    """
    if kind not in _ASK:
        raise ValueError(f"There is no kind of question {kind!r}; there are {list(QUESTION_KINDS)}.")
    return _ASK[kind](page, rng)


@dataclass(frozen=True)
class DrawnRow:
    """One benchmark row: a page and a question about it."""

    page: Page
    question: Question


def draw_rows(
    split: str,
    seed: int,
    count: int,
    kinds: tuple[str, ...] = ("fine", "coarse"),
    settings: PageSettings | None = None,
) -> Iterator[DrawnRow]:
    """Rows of a split, one page each; kinds of pages and of questions take turns.

    Args:
        seed: Gives fresh pages; a shorter run with the same seed is the beginning of a longer one.
        kinds: Kinds of questions.
    """
    of_pages = page_kinds(settings)
    for number in range(count):
        page_seed = seed * 10**7 + number
        kind = of_pages[number // len(kinds) % len(of_pages)]
        page = draw_page(page_seed, settings, kind, split)
        rng = random.Random(f"question/{split}/{page_seed}")
        yield DrawnRow(page, ask_question(page, kinds[number % len(kinds)], rng))


def question_corpus() -> list[str]:
    """Every question and answer that can occur, for building a tokenizer; answers often, so that each is a token.

    Questions about codes with letters say "code" for "number"; their capitals and dashes are no part of the corpus.
    """
    texts = [*COUNT_QUESTIONS.values(), *WHICH_QUESTIONS, BAR_QUESTION]
    texts += 40 * [*COLORS, *SHAPES, *WORDS, ABSENT]
    texts += [f"{down} {across}" for down in ("top", "middle", "bottom") for across in ("left", "center", "right")]
    texts += [str(n) for n in range(10)]
    texts += [SHAPE_QUESTION.format(color=color) for color in COLORS]
    texts += [COLOR_QUESTION.format(shape=shape) for shape in SHAPES]
    names = {"scene": [f"{color} {shape}" for color in COLORS for shape in SHAPES], "form": WORDS, "text": WORDS}
    for kind, of_kind in names.items():
        for name in of_kind:
            texts += [text.format(name=name) for text in FINE_QUESTIONS[kind]]
            texts.append(MULTI_QUESTIONS[kind].format(first=name, second=name))
    return texts + [WHERE_QUESTION.format(name=name) for name in names["scene"]]
