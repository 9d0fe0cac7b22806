"""Labels for the demo's branches, made by the demo's own backbone."""

import logging
import random

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from ..evaluation.synthetic import CODE_QUESTIONS, Box, Page, PageSettings, coarse_questions, code_question, draw_page
from .branches import BranchRow
from .demo_data import COARSE_TOKENS, LARGEST_SEED
from .packing import Batch, Packer, Sample, Segment, embed
from .region_labels import TriStateRule, grounding_scores, pool_map, response_maps, tri_state
from .tower import encode
from .views import IGNORE, cell_crop, whole_view


logger = logging.getLogger(__name__)

LABEL_PAGES = PageSettings(side=(900, 1300))
LEGIBLE_PAGES = PageSettings(side=(700, 1100), digit_width=(1 / 60, 1 / 26))
Head = tuple[int, int]


def draw_samples(
    rng: random.Random, count: int, tokens: int, settings: PageSettings = LABEL_PAGES
) -> tuple[list[Page], list[Sample]]:
    """Pages at a token budget, each with up to three fine questions and one coarse question about a shape."""
    pages, samples = [], []
    while len(pages) < count:
        page = draw_page(rng.randrange(LARGEST_SEED), settings)
        chosen = rng.sample(range(len(page.items)), min(3, len(page.items)))
        questions = [code_question(page, index, rng.choice(CODE_QUESTIONS)) for index in chosen]
        placed = [question for question in coarse_questions(page) if question.item is not None]
        questions += rng.sample(placed, min(1, len(placed)))
        pages.append(page)
        samples.append(Sample(whole_view(page, tokens), [Segment(question) for question in questions]))
    return pages, samples


@torch.no_grad()
def answer_greedily(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, image_tokens: Tensor) -> Tensor:
    """Replace the answers in `batch.input_ids` by the model's own; returns the tokens (B, n) predicted at each place.

    Every answer keeps its number of tokens, so all segments advance together.
    """
    labelled = batch.labels != IGNORE
    # the last labelled place of an answer predicts its end; only places whose successor is labelled have a successor
    inner = torch.zeros_like(labelled)
    inner[:, :-1] = labelled[:, :-1] & labelled[:, 1:] & (batch.segment[:, :-1] == batch.segment[:, 1:])
    predicted = batch.input_ids
    for _ in range(4):
        hidden = model.model.language_model(
            inputs_embeds=embed(model, batch, image_tokens),
            position_ids=batch.positions,
            attention_mask={"full_attention": batch.mask},
            use_cache=False,
        ).last_hidden_state
        predicted = model.lm_head(hidden).argmax(-1)
        rows, cols = inner.nonzero(as_tuple=True)
        batch.input_ids[rows, cols + 1] = predicted[rows, cols]
    return predicted


def _cells_inside(box: Box, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Share (h, w) of each cell of a page of `size` (width, height) that a box of pixels covers."""
    ys, xs = torch.arange(grid[0]) * size[1] / grid[0], torch.arange(grid[1]) * size[0] / grid[1]
    tall, wide = size[1] / grid[0], size[0] / grid[1]
    rows = (torch.clamp(ys + tall, max=box[3]) - torch.clamp(ys, min=box[1])).clamp(min=0) / tall
    cols = (torch.clamp(xs + wide, max=box[2]) - torch.clamp(xs, min=box[0])).clamp(min=0) / wide
    return rows[:, None] * cols[None, :]


def _maps(
    model: Qwen2_5_VLForConditionalGeneration, packer: Packer, samples: list[Sample], batch_size: int = 8
) -> tuple[list[list[Tensor]], list[list[bool]]]:
    """Per sample and question the attention (layers, heads, h, w) behind the own answer, and whether it is right."""
    decoder: nn.Module = model.model.language_model
    usual, maps, correct = decoder.config._attn_implementation, [], []
    try:
        for start in range(0, len(samples), batch_size):
            batch = packer(samples[start : start + batch_size])
            with torch.no_grad():
                tokens, _ = encode(model.model.visual, batch.views)
            decoder.set_attn_implementation(usual)
            hit = (answer_greedily(model, batch, tokens) == batch.labels) | (batch.labels == IGNORE)
            for row, sample in enumerate(samples[start : start + batch_size]):
                numbers = range(1, len(sample.segments) + 1)
                correct.append([bool(hit[row][batch.segment[row] == number].all()) for number in numbers])
            decoder.set_attn_implementation("eager")
            maps += response_maps(model, batch, tokens)
    finally:
        decoder.set_attn_implementation(usual)
    return maps, correct


def choose_heads(
    model: Qwen2_5_VLForConditionalGeneration,
    packer: Packer,
    tokens: int,
    count: int = 3,
    pages: int = 40,
    seed: int = 11,
) -> list[Head]:
    """The (layer, head) pairs that look at what a fine question asks about, best first."""
    drawn, samples = draw_samples(random.Random(seed), pages, tokens)
    maps, inside = [], []
    for page, sample, found in zip(drawn, samples, _maps(model, packer, samples)[0], strict=True):
        for segment, attention in zip(sample.segments, found, strict=True):
            if segment.question.kind == "fine":
                box = page.items[segment.question.item].box
                maps.append(attention)
                inside.append(_cells_inside(box, page.image.size, sample.view.grid))
    scores = grounding_scores(maps, inside)
    best = scores.flatten().argsort(descending=True)[:count]
    heads = [(int(index) // scores.shape[1], int(index) % scores.shape[1]) for index in best]
    logger.info("grounding heads %s with shares %s", heads, [round(float(scores[head]), 3) for head in heads])
    return heads


def region_rows(
    model: Qwen2_5_VLForConditionalGeneration,
    packer: Packer,
    heads: list[Head],
    pages: int,
    tokens: int,
    rule: TriStateRule,
    settings: PageSettings = LABEL_PAGES,
    only_right: bool = False,
    seed: int = 12,
) -> list[BranchRow]:
    """Rows with region labels on the coarse grid, from the attention at a budget of `tokens`.

    Args:
        only_right: Keep only what the model answers right at that budget: then it has looked at the right place. Needs
            pages that are legible there.
    """
    drawn, samples = draw_samples(random.Random(seed), pages, tokens, settings)
    rows = []
    for page, sample, found, correct in zip(drawn, samples, *_maps(model, packer, samples), strict=True):
        coarse = whole_view(page, COARSE_TOKENS)
        for segment, attention, right in zip(sample.segments, found, correct, strict=True):
            if only_right and not right:
                continue
            mean = torch.stack([attention[head] for head in heads]).mean(0)
            labels = tri_state(pool_map(mean, coarse.grid), rule=rule)
            if (labels == 1).any():
                rows.append(BranchRow(coarse, segment.question, region=labels))
    logger.info("%d region rows of %d questions", len(rows), sum(len(sample.segments) for sample in samples))
    return rows


@torch.no_grad()
def gate_rows(
    model: Qwen2_5_VLForConditionalGeneration, packer: Packer, pages: int, crop_tokens: int, seed: int = 13
) -> list[BranchRow]:
    """Rows with gate labels: right at the coarse budget is 0, wrong there and right with a crop is 1, else dropped."""
    rng = random.Random(seed)
    rows: list[BranchRow] = []
    for _ in range(0, pages, 16):
        samples = []
        for _ in range(16):
            page = draw_page(rng.randrange(LARGEST_SEED), LABEL_PAGES)
            view = whole_view(page, COARSE_TOKENS)
            fine = code_question(page, rng.randrange(len(page.items)), rng.choice(CODE_QUESTIONS))
            sample = Sample(view)
            for question in (fine, rng.choice(coarse_questions(page))):
                index = rng.randrange(len(page.items)) if question.item is None else question.item
                crop, cells = cell_crop(page, index, view.grid, crop_tokens, rng)
                sample.segments += [Segment(question), Segment(question, crop, cells)]
            samples.append(sample)
        batch = packer(samples)
        tokens, _ = encode(model.model.visual, batch.views)
        predicted = answer_greedily(model, batch, tokens)
        right = (predicted == batch.labels) | (batch.labels == IGNORE)
        for row, sample in enumerate(samples):
            correct = [bool(right[row][batch.segment[row] == number].all()) for number in range(1, 5)]
            for place in (0, 2):
                plain, zoomed = correct[place], correct[place + 1]
                if plain or zoomed:
                    rows.append(BranchRow(sample.view, sample.segments[place].question, gate=0 if plain else 1))
    logger.info("%d gate rows, %d of them zoom", len(rows), sum(row.gate for row in rows))
    return rows
