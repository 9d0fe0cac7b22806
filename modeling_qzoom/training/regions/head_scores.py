"""How much each attention head looks at what a question asks about, measured on drawn pages.

Two figures per head, each a mean over pages:

- grounding: the share of its response-to-image attention that falls inside the true box (grown by half a cell);
- sink: the share that three cells have for every question about a page, though none of its entries is there.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...asking.answers import in_batches
from ...asking.chats import encode_prompts, render
from ...asking.metrics import exact_match
from ...asking.session import Session
from ...data.drawn.pages import Page, Question
from ...data.drawn.questions import PAGE_KINDS, draw_page, fine_question
from ...zoom_regions_qzoom import Box, Rectangle, pixels_to_cells
from .config import FindHeadsConfig
from .look import Look, look
from .rule import covered_cells


_FIRST_SEED = 2 * 10**15  # far from the seeds of training and evaluation rows
_QUESTIONS_PER_PAGE = 2  # a sink is where a head looks whatever is asked
_SINK_CELLS = 3
_GROWTH = 0.5  # cells; a box seldom ends where a cell does


@dataclass
class HeadScores:
    """What was measured, (layers, heads) each; the decoder's last layer is not among them.

    Attributes:
        grounding: mean share of the image attention inside the true box.
        sink: mean share on three cells that no entry of the page touches.
        peak: mean of the largest cell, in absolute attention.
        right: share of questions that were answered right.
        answered: number of questions with a response.
    """

    grounding: Tensor
    sink: Tensor
    peak: Tensor
    right: float
    answered: int


def ask_pages(config: FindHeadsConfig) -> Iterator[tuple[Page, list[Question]]]:
    """The drawn pages, each with different questions about details."""
    for number in range(config.pages):
        seed = _FIRST_SEED + config.seed * 10**7 + number
        page = draw_page(seed, kind=PAGE_KINDS[number % len(PAGE_KINDS)])
        rng = random.Random(f"heads/{seed}")
        by_entry: dict[tuple[int, ...], Question] = {}
        for _ in range(4 * _QUESTIONS_PER_PAGE):
            question = fine_question(page, rng)
            by_entry.setdefault(question.items, question)
        yield page, list(by_entry.values())[:_QUESTIONS_PER_PAGE]


def _cells(box: Box, page: Page, grid: tuple[int, int], covered: Rectangle | None) -> Tensor:
    """Share (h, w) of each cell inside a box of page pixels that is grown by half a cell."""
    width, height = page.image.size
    x0, y0, x1, y1 = pixels_to_cells(box, grid, (height, width), covered)
    return covered_cells((x0 - _GROWTH, y0 - _GROWTH, x1 + _GROWTH, y1 + _GROWTH), grid)


def page_scores(
    maps: list[Tensor], page: Page, questions: list[Question], covered: Rectangle | None
) -> tuple[Tensor, Tensor]:
    """Grounding and sink shares of the heads on one page.

    Args:
        maps: attention (heads, h, w) of each question.
        page: the page.
        questions: one question for each map.
        covered: rectangle of page pixels under the grid, where it is not the page.

    Returns:
        (questions, heads) grounding and (heads,) sink shares.
    """
    shares = [attention / attention.sum((1, 2), keepdim=True).clamp(min=1e-12) for attention in maps]
    grid = (maps[0].shape[1], maps[0].shape[2])
    grounding = torch.stack(
        [
            (share * _cells(question.box, page, grid, covered)).sum((1, 2))
            for share, question in zip(shares, questions, strict=True)
        ]
    )
    free = torch.ones(grid)
    for entry in page.entries:
        free *= _cells(entry.box, page, grid, covered) == 0
    constant = (torch.stack(shares).amin(0) * free).flatten(1)  # (heads, h · w): what every question leaves there
    return grounding, constant.topk(min(_SINK_CELLS, constant.shape[1])).values.sum(1)


@dataclass
class PagePrompts:
    """A page with the questions about it, and their inputs one by one."""

    page: Page
    questions: list[Question]
    features: list[dict[str, Any]]

    @property
    def covered(self) -> Rectangle | None:
        """Rectangle of page pixels under the grid, where it is not the page."""
        boxes = self.features[0].get("source_boxes")
        return None if boxes is None else tuple(boxes[0].tolist())


def _encode(session: Session, page: Page, questions: list[Question]) -> PagePrompts:
    prompts = [render(session.processor, [(question.text, None)], session.config) for question in questions]
    features = [encode_prompts(session.processor, [page.image], [prompt]) for prompt in prompts]
    return PagePrompts(page, questions, features)


def _batches(session: Session, config: FindHeadsConfig) -> Iterator[list[PagePrompts]]:
    """Pages that go through the model together."""
    for batch in in_batches(ask_pages(config), config.batch_size):
        yield [_encode(session, page, questions) for page, questions in batch]


def _looks(session: Session, batch: list[PagePrompts], query_tokens: str) -> list[list[Look]]:
    """Answers and attention of all heads, per page and question."""
    features = [feature for prompts in batch for feature in prompts.features]
    pages = [number for number, prompts in enumerate(batch) for _ in prompts.questions]
    looks = iter(look(session, features, pages, None, query_tokens))
    return [[next(looks) for _ in prompts.questions] for prompts in batch]


def measure_heads(session: Session, config: FindHeadsConfig) -> HeadScores:
    """Score every head on the drawn pages.

    Raises:
        ValueError: the model answers none of the questions.
    """
    from tqdm.auto import tqdm

    grounding, sinks, peaks, right = [], [], [], []
    with tqdm(total=config.pages, desc="find-heads", unit="page") as progress:
        for batch in _batches(session, config):
            for prompts, looks in zip(batch, _looks(session, batch, config.query_tokens), strict=True):
                pairs = list(zip(looks, prompts.questions, strict=True))
                right += [exact_match(seen.response, question.answer) for seen, question in pairs]
                answered = [(seen.attention, question) for seen, question in pairs if seen.attention is not None]
                if answered:
                    maps, questions = [pair[0] for pair in answered], [pair[1] for pair in answered]
                    inside, constant = page_scores(maps, prompts.page, questions, prompts.covered)
                    grounding.append(inside)
                    sinks.append(constant)
                    peaks.append(torch.stack(maps).amax((2, 3)))
            progress.update(len(batch))
    if not grounding:
        raise ValueError(
            f"The model answers none of {len(right)} questions about drawn pages, so there is no attention to score; "
            "check prompt_suffix and max_new_tokens (at least 2)."
        )
    text = session.model.config.get_text_config()
    shape = (text.num_hidden_layers - 1, text.num_attention_heads)
    inside = torch.cat(grounding)
    return HeadScores(
        grounding=inside.mean(0).view(shape),
        sink=torch.stack(sinks).mean(0).view(shape),
        peak=torch.cat(peaks).mean(0).view(shape),
        right=sum(right) / len(right),
        answered=len(inside),
    )
