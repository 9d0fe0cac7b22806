"""Rows about drawn pages, for training: the pages are drawn again whenever their images are needed."""

import random
from dataclasses import dataclass

from PIL import Image

from ..rows import Row, Rows
from .pages import PageSettings, named_settings
from .questions import ask_question, draw_page, page_kinds


@dataclass(frozen=True)
class _DrawnImage:
    """Draws its page again each time, so that thousands of rows fit in memory."""

    split: str
    seed: int
    kind: str
    settings: PageSettings

    def __call__(self) -> Image.Image:
        return draw_page(self.seed, self.settings, self.kind, self.split).image


QUESTIONS = ("fine", "coarse", "fine", "coarse")  # kinds of the questions about a page


def page_rows(split: str, seed: int, number: int, pages: str = "plain") -> list[Row]:
    """Rows about one page, whose questions all differ.

    Args:
        split: split that the page belongs to.
        seed: seed of the pages; other seeds give other pages.
        number: which of the seed's pages.
        pages: name of the pages' settings, see `PAGE_SETTINGS`.

    Raises:
        ValueError: an unknown split, or settings that do not exist.
    """
    settings = named_settings(pages)
    kinds, part = page_kinds(settings), split if pages == "plain" else f"{split}/{pages}"
    # far above the seeds of evaluation rows, in case both use one split
    page_seed = 10**15 + seed * 10**7 + number
    kind = kinds[number % len(kinds)]
    page = draw_page(page_seed, settings, kind, split)
    rng = random.Random(f"rows/{split}/{page_seed}")
    questions = {}
    for question_kind in QUESTIONS:
        question = ask_question(page, question_kind, rng)
        questions[question.text] = question
    name, image = f"{part.replace('/', '-')}-{page_seed}", _DrawnImage(split, page_seed, kind, settings)
    return [
        Row(f"{name}-{place}", image, question.text, (question.answer,), name, question.box, question.kind)
        for place, question in enumerate(questions.values())
    ]


def drawn_rows(split: str, count: int, seed: int, pages: str = "plain") -> Rows:
    """Rows about benchmark pages: every page with two questions about details and two that need none.

    Args:
        split: split that the pages belong to.
        count: number of rows.
        seed: seed of the pages; other seeds give other pages.
        pages: name of the pages' settings, see `PAGE_SETTINGS`.

    Raises:
        ValueError: an unknown split, or settings that do not exist.
    """
    part = split if pages == "plain" else f"{split}/{pages}"
    rows: list[Row] = []
    number = 0
    while len(rows) < count:
        rows += page_rows(split, seed, number, pages)
        number += 1
    return Rows(rows[:count], f"drawn/{part}/{count}/{seed}")
