"""Training samples for the demo's backbone: which pages, views and questions each stage sees."""

import random
from collections.abc import Callable
from dataclasses import replace

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from hub_release.demo.backbone.packing import Batch, Packer, Sample, Segment
from hub_release.demo.backbone.view_batch import ViewBatch, stack_views
from hub_release.demo.backbone.views import View, cell_crop, code_view, entry_view, whole_view
from modeling_qzoom.data.drawn.pages import Page, PageSettings, Question, union
from modeling_qzoom.data.drawn.questions import (
    absent_question,
    coarse_question,
    code_question,
    draw_page,
    multi_question,
)


COARSE_TOKENS = 64
LARGE = PageSettings(side=(500, 800), digit_width=(1 / 30, 1 / 18))
FEW = PageSettings(side=(500, 700), items=(2, 3), digit_width=(1 / 26, 1 / 19))
MIXED = PageSettings(side=(700, 1200), digit_width=(1 / 66, 1 / 36))
BENCHMARK = PageSettings(side=(900, 1400))
# how often each kind of page is drawn, in every stage
PAGE_KINDS = {"scene": 4, "form": 3, "text": 4}


def random_page(rng: random.Random, settings: PageSettings) -> Page:
    """A page of the training split."""
    kind = rng.choices(list(PAGE_KINDS), list(PAGE_KINDS.values()))[0]
    return draw_page(rng.randrange(10**12), settings, kind)


def _codes(page: Page, among: tuple[int, ...], count: int, rng: random.Random) -> list[Segment]:
    """Questions about some of the codes that a view shows, now and then about two at once or about none."""
    indices = rng.sample(among, min(count, len(among)))
    segments = [Segment(code_question(page, index, rng)) for index in indices]
    if len(among) > 1 and rng.random() < 0.15:
        question = multi_question(page, rng)
        if set(question.items) <= set(among):
            segments.append(Segment(question))
    return segments


def _coarse(page: Page, count: int, rng: random.Random) -> list[Segment]:
    """Different questions that need no small print, now and then one about what is not there."""
    questions: dict[str, Question] = {}
    for _ in range(count):
        question = coarse_question(page, rng)
        questions[question.text] = question
    if rng.random() < 0.2:
        question = absent_question(page, rng)
        questions[question.text] = question
    return [Segment(question) for question in questions.values()]


def tower_views(rng: random.Random, count: int, digits: tuple[float, float]) -> list[View]:
    """Views for the tower's dense labels: crops with digits `digits` pixels wide, some whole pages."""
    views: list[View] = []
    while len(views) < count:
        page = random_page(rng, MIXED if rng.random() < 0.75 else LARGE)
        for index in rng.sample(range(len(page.entries)), min(3, len(page.entries))):
            if page.entries[index].large:
                continue
            view = code_view(page, index, rng.choice([16, 25, 25, 36]), rng, digits)
            if page.kind != "scene" and rng.random() < 0.5:
                view = entry_view(page, index, 48, rng, digits) or view
            views.append(view)
        if rng.random() < 0.6:
            views.append(whole_view(page, COARSE_TOKENS))
        if rng.random() < 0.08:
            views.append(whole_view(page, 144))
    return views


def crop_sample(rng: random.Random) -> Sample:
    """A small view that holds an entry with legible digits: learns to read."""
    while True:
        page = random_page(rng, LARGE if rng.random() < 0.5 else MIXED)
        view = entry_view(page, rng.randrange(len(page.entries)), 48, rng, (8.5, 18))
        if view is not None and view.legible:
            return Sample(view, _codes(page, view.legible, 4, rng))


def part_sample(rng: random.Random) -> Sample:
    """A part of a page with several legible codes at once: learns to search where it can read."""
    while True:
        page = random_page(rng, MIXED)
        first = rng.randrange(len(page.entries) - 1)
        pair = page.entries[first : first + 2]
        view = entry_view(page, first, 120, rng, (8.5, 13), union(*(entry.box for entry in pair)))
        if view is not None and len(view.legible) > 1:
            return Sample(view, _codes(page, view.legible, 7, rng))


def search_sample(rng: random.Random) -> Sample:
    """Several legible codes in one view, no crop."""
    return part_sample(rng) if rng.random() < 0.4 else whole_sample(rng, few_share=0.2)


def whole_sample(rng: random.Random, few_share: float = 0.7) -> Sample:
    """A whole page with large, legible codes and questions of both kinds.

    Args:
        few_share: share of pages with two or three entries only, where searching is easier to learn.
    """
    while True:
        few = rng.random() < few_share
        page = random_page(rng, FEW if few else LARGE)
        view = whole_view(page, COARSE_TOKENS if few else rng.choice([COARSE_TOKENS, 100, 144]))
        if view.legible:
            return Sample(view, _codes(page, view.legible, 7, rng) + _coarse(page, 8, rng))


def large_sample(rng: random.Random) -> Sample:
    """A whole page in many tokens: what the plain model needs where it may not zoom."""
    while True:
        page = random_page(rng, MIXED if rng.random() < 0.5 else BENCHMARK)
        view = whole_view(page, rng.choice([256, 400, 512]))
        if view.legible:
            return Sample(view, _codes(page, view.legible, 7, rng) + _coarse(page, 6, rng))


def fused_sample(rng: random.Random) -> Sample:
    """A page at the coarse budget with crops as inference makes them, plain rows beside them.

    One crop in five stands at the positions of a second image. Some crops lie around the wrong entry: then the page's
    own tokens have to answer.
    """
    page = random_page(rng, MIXED if rng.random() < 0.6 else BENCHMARK)
    view = whole_view(page, COARSE_TOKENS)
    small = [index for index, entry in enumerate(page.entries) if not entry.large]

    def crop(question: Question, index: int, tokens: int) -> Segment:
        entry = page.entries[index]
        target = entry.line if rng.random() < 0.7 else question.box if question.items else entry.code_box
        seen, cells = cell_crop(page, target, view.grid, tokens, rng)
        return Segment(question, seen, cells if rng.random() < 0.8 else None)

    segments: list[Segment] = []
    for index in rng.sample(small, min(2, len(small))):
        segments.append(crop(code_question(page, index, rng), index, rng.choice([49, 64, 100, 144, 144])))
    segments += _coarse(page, 6, rng)
    if rng.random() < 0.2:
        segments.append(Segment(code_question(page, rng.choice(small), rng)))
    if rng.random() < 0.25:
        segments.append(crop(coarse_question(page, rng), rng.choice(small), 64))
    return Sample(view, segments)


# samples by name, as the stages of the decoder count them
DRAW: dict[str, Callable[[random.Random], Sample]] = {
    "crop": crop_sample,
    "whole": whole_sample,
    "search": search_sample,
    "page": fused_sample,
    "large": large_sample,
}


class TowerSteps(Dataset):
    """The tower's batches by step: large digits first.

    Args:
        views: views per step.
    """

    def __init__(self, seed: int, steps: int, views: int) -> None:
        self.seed, self.steps, self.views = seed, steps, views

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> ViewBatch:
        rng = random.Random(f"tower/{self.seed}/{step}")
        return stack_views(tower_views(rng, self.views, (18 if step < 0.2 * self.steps else 8.5, 28)))


class DecoderSteps(Dataset):
    """The decoder's batches by step.

    Args:
        groups: samples per step by name, see `DRAW`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        groups: dict[str, int],
        seed: int,
        steps: int,
    ) -> None:
        self.packer, self.groups, self.seed, self.steps = Packer(tokenizer), groups, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"decoder/{self.seed}/{step}")
        samples = []
        for name, count in self.groups.items():
            samples += [replace(DRAW[name](rng), name=f"{name}/") for _ in range(count)]
        return self.packer(samples)
