"""From raw attention maps to region labels: foreground, background and "do not know" (paper III-C2, eq. 11 and 12).

Maps are (h, w) in merged visual tokens, "cells". Raw maps are what is stored; thresholds apply when they are loaded.
"""

import torch
from torch import Tensor

from ...training_losses_qzoom import IGNORED
from ...zoom_regions_qzoom import Rectangle
from .config import LabelRule
from .record import RegionRecord


def _shares(start: float, end: float, cells: int) -> Tensor:
    """(cells,) share of each unit cell of an axis that the interval covers."""
    edges = torch.arange(cells + 1, dtype=torch.float32).clamp(start, max(start, end))
    return edges[1:] - edges[:-1]


def covered_cells(box: Rectangle, grid: tuple[int, int]) -> Tensor:
    """Share (h, w) of each cell that a box covers.

    Args:
        box: (x0, y0, x1, y1) in cells; it may reach beyond the grid.
        grid: (h, w) of the cells.
    """
    x0, y0, x1, y1 = box
    return _shares(y0, y1, grid[0])[:, None] * _shares(x0, x1, grid[1])


def remove_sinks(attention: Tensor, sinks: Tensor | None, rule: LabelRule) -> Tensor:
    """A map (h, w) with zeros where the sink heads' map (h, w) reaches the threshold."""
    if sinks is None or not rule.remove_sinks:
        return attention
    return attention.masked_fill(sinks >= rule.sink, 0.0)


def tri_state(attention: Tensor, sinks: Tensor | None, rule: LabelRule, content: Rectangle | None = None) -> Tensor:
    """Labels of a map.

    Foreground are the cells near the maximum. A box round them grows by `rule.dilation` cells; outside it, cells far
    below the maximum are background, sinks among them. What is left is unknown.

    Args:
        attention: (h, w) response-to-image attention.
        sinks: (h, w) attention of sink heads, None without any.
        rule: thresholds.
        content: (x0, y0, x1, y1) in cells where the image is, if the rest of the grid is padding (background).

    Returns:
        (h, w) long in {1, 0, -100}; all -100 if the map says nothing: its maximum is too low or the box too large.
    """
    height, width = attention.shape
    labels = torch.full((height, width), IGNORED)
    if content is None:
        padding = torch.zeros(height, width, dtype=torch.bool)
    else:
        padding = covered_cells(content, (height, width)) < 0.5
    clean = remove_sinks(attention, sinks, rule)
    inside = clean.masked_fill(padding, 0.0)
    peak = inside.max()
    if peak <= 0 or peak < rule.faintest_peak:
        return labels
    foreground = inside > rule.foreground * peak
    rows, columns = foreground.any(1).nonzero()[:, 0].tolist(), foreground.any(0).nonzero()[:, 0].tolist()
    grow = rule.dilation
    top, bottom = max(0, rows[0] - grow), min(height, rows[-1] + 1 + grow)
    left, right = max(0, columns[0] - grow), min(width, columns[-1] + 1 + grow)
    if (bottom - top) * (right - left) >= rule.largest_box * height * width:
        return labels
    if rule.tri_state:
        background = clean < rule.background * peak
        background[top:bottom, left:right] = False
        labels[background | padding] = 0
    else:
        labels[:] = 0
    labels[foreground] = 1
    return labels


def _overlaps(source: int, target: int) -> Tensor:
    """(target, source): share of each source cell that lies in each target cell, on a common axis."""
    edges = torch.arange(source + 1) * target / source
    cells = torch.arange(target)[:, None]
    lengths = (torch.minimum(edges[1:], cells + 1) - torch.maximum(edges[:-1], cells)).clamp(min=0)
    return lengths * source / target


def pool_map(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a map (h, w) to another grid by area; the sum over any region is kept."""
    height, width = attention.shape
    return _overlaps(height, grid[0]) @ attention @ _overlaps(width, grid[1]).T


def load_region_targets(record: RegionRecord, grid: tuple[int, int], rule: LabelRule) -> Tensor:
    """Labels of a record of `label-regions`.

    Args:
        record: the record, with its raw maps.
        grid: (h, w) of the coarse view that is trained on.
        rule: thresholds. With `pool`, a map of another grid is brought to this one first. Sinks are removed before,
            because their threshold is meant for single cells of the map as it was measured; pooling to fewer cells
            raises values, so `faintest_peak` then lets more maps pass.

    Returns:
        (h, w) long in {1, 0, -100}, on `grid` or, without `pool`, on the record's own. All -100: no labels.
    """
    attention, sinks = torch.tensor(record.grounding), torch.tensor(record.sinks)
    content, (height, width) = record.content, record.grid
    if not rule.pool or grid == record.grid:
        return tri_state(attention, sinks, rule, content)
    if content is not None:
        across, down = grid[1] / width, grid[0] / height
        content = content[0] * across, content[1] * down, content[2] * across, content[3] * down
    return tri_state(pool_map(remove_sinks(attention, sinks, rule), grid), None, rule, content)
