"""`find-heads`: which attention heads look at what a question asks about, measured on drawn pages.

Two figures per head, each a mean over pages:

- grounding: the share of its response-to-image attention that falls inside the true box (grown by half a cell);
- sink: the share that three cells have for every question about a page, though none of its entries is there.
"""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...asking.chats import encode_prompts, render
from ...asking.fingerprints import backbone_fingerprint
from ...asking.metrics import exact_match
from ...asking.session import Session, open_session
from ...data.drawn.pages import Box, Page, Question
from ...data.drawn.questions import PAGE_KINDS, draw_page, fine_question
from ...data.files import check_output_file
from ...zoom_regions_qzoom import Rectangle, pixels_to_cells
from .attention import QUERY_TOKENS, Look, look
from .config import FindHeadsConfig, Heads, TriStateConfig
from .rule import covered_cells


logger = logging.getLogger(__name__)

_FIRST_SEED = 2 * 10**15  # far from the seeds of training and evaluation rows
_QUESTIONS_PER_PAGE = 2  # a sink is where a head looks whatever is asked
_SINK_CELLS = 3
_GROWTH = 0.5  # cells; a box seldom ends where a cell does
_SHOWN = 8


@dataclass
class HeadScores:
    """What was measured, (layers, heads) each; the decoder's last layer is not among them.

    Args:
        grounding: Mean share of the image attention inside the true box.
        sink: Mean share on three cells that no entry of the page touches.
        peak: Mean of the largest cell, in absolute attention.
        right: Share of questions that were answered right.
        answered: Questions with a response.
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
        maps: Per question the attention (heads, h, w).
        questions: As many.
        covered: Rectangle of page pixels under the grid, where it is not the page.

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
class _Asked:
    """A page with the questions about it, and their inputs one by one."""

    page: Page
    questions: list[Question]
    features: list[dict[str, Any]]

    @property
    def covered(self) -> Rectangle | None:
        """Rectangle of page pixels under the grid, where it is not the page."""
        boxes = self.features[0].get("source_boxes")
        return None if boxes is None else tuple(boxes[0].tolist())


def _batches(session: Session, config: FindHeadsConfig) -> Iterator[list[_Asked]]:
    """Pages that go through the model together."""
    batch = []
    for page, questions in ask_pages(config):
        prompts = [render(session.processor, [(question.text, None)], config) for question in questions]
        features = [encode_prompts(session.processor, [page.image], [prompt]) for prompt in prompts]
        batch.append(_Asked(page, questions, features))
        if len(batch) == config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _looks(session: Session, batch: list[_Asked], query_tokens: str) -> list[list[Look]]:
    """Answers and attention of all heads, per page and question."""
    features = [feature for asked in batch for feature in asked.features]
    pages = [number for number, asked in enumerate(batch) for _ in asked.questions]
    looks = iter(look(session, features, pages, None, query_tokens))
    return [[next(looks) for _ in asked.questions] for asked in batch]


def measure_heads(session: Session, config: FindHeadsConfig) -> HeadScores:
    """Score every head on the drawn pages.

    Raises:
        ValueError: The model answers none of the questions.
    """
    from tqdm.auto import tqdm

    grounding, sinks, peaks, right = [], [], [], []
    with tqdm(total=config.pages, desc="find-heads", unit="page") as progress:
        for batch in _batches(session, config):
            for asked, looks in zip(batch, _looks(session, batch, config.query_tokens), strict=True):
                pairs = list(zip(looks, asked.questions, strict=True))
                right += [exact_match(seen.response, question.answer) for seen, question in pairs]
                told = [(seen.attention, question) for seen, question in pairs if seen.attention is not None]
                if told:
                    maps, questions = [pair[0] for pair in told], [pair[1] for pair in told]
                    inside, constant = page_scores(maps, asked.page, questions, asked.covered)
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


def _best(scores: Tensor, count: int) -> list[tuple[int, int]]:
    """(layer, head) of the highest scores, best first; -inf is never chosen."""
    order = scores.flatten().argsort(descending=True, stable=True)[:count].tolist()
    heads = [divmod(index, scores.shape[1]) for index in order]
    return [(layer, head) for layer, head in heads if scores[layer, head] > -torch.inf]


def _table(heads: list[tuple[int, int]]) -> Heads:
    """(layer, head) pairs by layer."""
    table: Heads = {}
    for layer, head in sorted(heads):
        table.setdefault(layer, []).append(head)
    return table


def choose_heads(scores: HeadScores, config: FindHeadsConfig) -> tuple[Heads, Heads]:
    """Grounding heads and sink heads.

    Heads whose maps are so faint that labels would ignore them (`TriStateConfig.faintest_peak`) come last.
    """
    strong = scores.peak >= TriStateConfig().faintest_peak
    grounding = _best(scores.grounding + strong, config.grounding_count)
    rest = scores.sink.clone()
    rest[rest < config.sink_share] = -torch.inf
    for layer, head in grounding:
        rest[layer, head] = -torch.inf
    return _table(grounding), _table(_best(rest, config.sink_count))


def _log_table(scores: HeadScores, grounding: Heads, sinks: Heads) -> None:
    """The best heads of either sort."""
    logger.info("%d questions, %.1f %% answered right", scores.answered, 100 * scores.right)
    for name, values, chosen in (("grounding", scores.grounding, grounding), ("sink", scores.sink, sinks)):
        for layer, head in _best(values, _SHOWN):
            mark = "*" if head in chosen.get(layer, []) else " "
            logger.info(
                "%-9s %s layer %2d head %2d: %.3f, peak %.4f",
                name,
                mark,
                layer,
                head,
                values[layer, head],
                scores.peak[layer, head],
            )


def _rounded(values: Tensor) -> dict[int, list[float]]:
    return {layer: [round(value, 4) for value in row] for layer, row in enumerate(values.tolist())}


def write_heads(path: str | Path, content: dict[str, Any]) -> None:
    """Write the YAML file that `label-regions` reads; a reader never sees half of it.

    Raises:
        ImportError: PyYAML is missing; the extra `train` installs it.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("The heads file needs PyYAML: pip install 'qzoom[train]'.") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=119), encoding="utf-8")
    partial.replace(path)


def run(config: FindHeadsConfig) -> None:
    """Measure, choose and write `config.output`. One process does it all.

    Raises:
        ValueError: An option out of range, or a model that answers nothing.
    """
    from accelerate import PartialState

    for name in ("pages", "batch_size", "grounding_count"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if config.query_tokens not in QUERY_TOKENS:
        raise ValueError(f"query_tokens must be one of {list(QUERY_TOKENS)}, got {config.query_tokens!r}.")
    check_output_file(config.output, "output")
    if not PartialState().is_main_process:
        return
    session = open_session(config)
    scores = measure_heads(session, config)
    grounding, sinks = choose_heads(scores, config)
    _log_table(scores, grounding, sinks)
    write_heads(
        config.output,
        {
            "grounding_heads": grounding,
            "sink_heads": sinks,
            "query_tokens": config.query_tokens,
            "model": config.model,
            "backbone": backbone_fingerprint(session.model),
            "max_tokens": session.processor.max_tokens,
            "right_answers": round(scores.right, 4),
            "scores": {"grounding": _rounded(scores.grounding), "sink": _rounded(scores.sink)},
        },
    )
    logger.info("grounding heads %s, sink heads %s, written to %s", grounding, sinks, config.output)
