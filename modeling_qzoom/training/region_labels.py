"""Region labels from the model's own attention: where does it look while it answers?

Response-to-image attention of a few grounding heads is averaged over the tokens of the answer, brought to the coarse
grid and cut into foreground, background and "do not know".
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from .packing import Batch, embed
from .views import IGNORE


@dataclass(frozen=True)
class TriStateRule:
    """Shares of the map's maximum that separate the three states.

    Args:
        foreground: Cells above this share are foreground.
        background: Cells below this share are background, where they lie outside the foreground's grown box.
        growth: Cells by which the foreground's box grows on every side.
        largest_box: A grown box that covers this share of the grid or more says nothing: no labels.
        faintest_peak: A map whose maximum is lower says nothing: no labels.
        sink: Cells whose sink attention reaches this are never foreground.
    """

    foreground: float = 0.25
    background: float = 0.05
    growth: int = 1
    largest_box: float = 0.5
    faintest_peak: float = 5e-3
    sink: float = 0.01


def tri_state(attention: Tensor, sinks: Tensor | None = None, rule: TriStateRule | None = None) -> Tensor:
    """Labels (h, w) in {1, 0, -100} of an attention map (h, w) and an optional map of sink attention (h, w)."""
    rule = rule or TriStateRule()
    h, w = attention.shape
    labels = torch.full((h, w), IGNORE, dtype=torch.long)
    clean = attention if sinks is None else attention.masked_fill(sinks >= rule.sink, 0.0)
    peak = clean.max()
    if peak < rule.faintest_peak:
        return labels
    foreground = clean > rule.foreground * peak
    rows, cols = foreground.any(1).nonzero().flatten(), foreground.any(0).nonzero().flatten()
    top, bottom = max(0, int(rows[0]) - rule.growth), min(h, int(rows[-1]) + 1 + rule.growth)
    left, right = max(0, int(cols[0]) - rule.growth), min(w, int(cols[-1]) + 1 + rule.growth)
    if (bottom - top) * (right - left) >= rule.largest_box * h * w:
        return labels
    background = clean < rule.background * peak
    background[top:bottom, left:right] = False
    labels[background] = 0
    labels[foreground] = 1
    return labels


def _overlaps(source: int, target: int) -> Tensor:
    """(target, source): share of each source cell that lies in each target cell, on a common axis."""
    edges = torch.arange(source + 1) * target / source
    cells = torch.arange(target)[:, None]
    lengths = (torch.minimum(edges[1:], cells + 1) - torch.maximum(edges[:-1], cells)).clamp(min=0)
    return lengths * source / target


def pool_map(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a map (h, w) to another grid; the sum over any region is kept."""
    h, w = attention.shape
    return _overlaps(h, grid[0]) @ attention @ _overlaps(w, grid[1]).T


@torch.no_grad()
def response_maps(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, image_tokens: Tensor) -> list[list[Tensor]]:
    """Attention to the page's image tokens from the places that predict a segment's answer, averaged over them.

    The decoder has to run with eager attention, the only one that returns its weights.

    Returns:
        Per sample and segment a map (layers, heads, h, w). Maps of samples with crops cover the page's tokens only.
    """
    weights = model.model.language_model(
        inputs_embeds=embed(model, batch, image_tokens),
        position_ids=batch.positions,
        attention_mask={"full_attention": torch.where(batch.mask, 0.0, torch.finfo(torch.float32).min)},
        use_cache=False,
        output_attentions=True,
    ).attentions
    stacked = torch.stack(weights, dim=1).float()  # (B, layers, heads, n, n)
    page_views, at = [], 0
    for row in range(len(batch.input_ids)):
        page_views.append(batch.views[at])
        at += 1 + int(((batch.input_ids[row] == model.config.vision_start_token_id) & (batch.segment[row] > 0)).sum())
    maps = []
    for row, view in enumerate(page_views):
        page = (batch.input_ids[row] == model.config.image_token_id) & (batch.segment[row] == 0)
        maps.append([])
        for number in range(1, int(batch.segment[row].max()) + 1):
            # a place looks for what it predicts next; the last one predicts the end, which is nowhere on the page
            answer = ((batch.segment[row] == number) & (batch.labels[row] != IGNORE)).nonzero().flatten()[:-1]
            seen = stacked[row][:, :, answer][..., page].mean(2)
            maps[-1].append(seen.view(*seen.shape[:2], *view.grid))
    return maps


def grounding_scores(maps: list[Tensor], inside: list[Tensor]) -> Tensor:
    """Mean share (layers, heads) of the image attention that falls inside the true places.

    Args:
        maps: Per question a map (layers, heads, h, w).
        inside: Per question the share (h, w) of each cell that lies inside the true box.
    """
    found = []
    for attention, place in zip(maps, inside, strict=True):
        found.append((attention * place).sum((-2, -1)) / attention.sum((-2, -1)).clamp(min=1e-9))
    return torch.stack(found).mean(0)
