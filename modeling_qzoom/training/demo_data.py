"""Training samples for the demo: which pages, views and questions each stage sees."""

import random

from ..evaluation.synthetic import (
    CODE_QUESTIONS,
    Page,
    PageSettings,
    Question,
    coarse_questions,
    code_question,
    draw_page,
)
from .packing import Sample, Segment
from .views import View, cell_crop, item_view, whole_view


COARSE_TOKENS = 64
LARGE = PageSettings(side=(500, 800), digit_width=(1 / 30, 1 / 18))
FEW = PageSettings(side=(500, 700), items=(2, 3), digit_width=(1 / 26, 1 / 19))
MIXED = PageSettings(side=(700, 1200), digit_width=(1 / 66, 1 / 36))
LARGEST_SEED = 10**9
"""Training pages have seeds below this, evaluation pages above: they never meet."""


def _page(rng: random.Random, settings: PageSettings | None) -> Page:
    return draw_page(rng.randrange(LARGEST_SEED), settings)


def _fine(page: Page, index: int, rng: random.Random) -> Question:
    return code_question(page, index, rng.choice(CODE_QUESTIONS))


def _some_coarse(page: Page, count: int, rng: random.Random) -> list[Question]:
    questions = coarse_questions(page)
    return rng.sample(questions, min(count, len(questions)))


def tower_views(rng: random.Random, count: int, digits: tuple[float, float]) -> list[View]:
    """Views for the tower's dense labels: crops with digits `digits` pixels wide, some whole pages."""
    views = []
    while len(views) < count:
        page = _page(rng, MIXED if rng.random() < 0.75 else LARGE)
        for index in rng.sample(range(len(page.items)), min(3, len(page.items))):
            views.append(item_view(page, index, rng.choice([16, 25, 25, 36]), rng, digits))
        if rng.random() < 0.5:
            views.append(whole_view(page, COARSE_TOKENS))
        if rng.random() < 0.08:
            views.append(whole_view(page, 144))
    return views


def crop_sample(rng: random.Random) -> Sample:
    """A small view around an item with legible digits, and the codes that it shows: learns to read."""
    while True:
        page = _page(rng, LARGE if rng.random() < 0.5 else MIXED)
        view = item_view(page, rng.randrange(len(page.items)), rng.choice([16, 25, 36]), rng, (9, 18))
        if view.legible:
            chosen = rng.sample(view.legible, min(4, len(view.legible)))
            return Sample(view, [Segment(_fine(page, index, rng)) for index in chosen])


def part_sample(rng: random.Random) -> Sample:
    """A large part of a page, several legible codes at once: learns to search where it can read."""
    while True:
        page = _page(rng, MIXED)
        view = item_view(page, rng.randrange(len(page.items)), rng.choice([64, 100]), rng, (9, 13))
        if len(view.legible) > 1:
            chosen = rng.sample(view.legible, min(5, len(view.legible)))
            return Sample(view, [Segment(_fine(page, index, rng)) for index in chosen])


def search_sample(rng: random.Random) -> Sample:
    """Several legible codes in one view, no crop."""
    return part_sample(rng) if rng.random() < 0.4 else whole_sample(rng, few_share=0.2)


def whole_sample(rng: random.Random, few_share: float = 0.7) -> Sample:
    """A whole page with large, legible codes and questions of both kinds.

    Args:
        few_share: Share of pages with two or three items only, where searching is easier to learn.
    """
    while True:
        few = rng.random() < few_share
        page = _page(rng, FEW if few else LARGE)
        view = whole_view(page, COARSE_TOKENS if few else rng.choice([COARSE_TOKENS, 100, 144]))
        if view.legible:
            chosen = rng.sample(view.legible, min(4, len(view.legible)))
            segments = [Segment(_fine(page, index, rng)) for index in chosen]
            return Sample(view, segments + [Segment(question) for question in _some_coarse(page, 3, rng)])


def large_sample(rng: random.Random) -> Sample:
    """A whole page in many tokens: what the plain model needs where it may not zoom."""
    while True:
        page = _page(rng, MIXED)
        view = whole_view(page, rng.choice([256, 400, 512]))
        if view.legible:
            chosen = rng.sample(view.legible, min(6, len(view.legible)))
            segments = [Segment(_fine(page, index, rng)) for index in chosen]
            return Sample(view, segments + [Segment(question) for question in _some_coarse(page, 2, rng)])


def fused_sample(rng: random.Random) -> Sample:
    """A page at the coarse budget with crops as inference makes them, plain rows beside them.

    Some crops lie around the wrong item: then the page's own tokens have to answer.
    """
    page = _page(rng, MIXED if rng.random() < 0.7 else PageSettings(side=(1000, 1300)))
    view = whole_view(page, COARSE_TOKENS)
    segments = []
    for index in rng.sample(range(len(page.items)), min(2, len(page.items))):
        crop, cells = cell_crop(page, index, view.grid, rng.choice([49, 64, 100, 100, 144]), rng)
        segments.append(Segment(_fine(page, index, rng), crop, cells))
    segments += [Segment(question) for question in _some_coarse(page, 2, rng)]
    if rng.random() < 0.3:
        segments.append(Segment(_fine(page, rng.randrange(len(page.items)), rng)))
    if rng.random() < 0.25:
        crop, cells = cell_crop(page, rng.randrange(len(page.items)), view.grid, 36, rng)
        segments.append(Segment(_some_coarse(page, 1, rng)[0], crop, cells))
    return Sample(view, segments)
