"""From region logits to a box of source pixels (paper III-C, eq. 6 and 7).

Conventions: maps are (height, width) in merged visual tokens, "cells"; boxes are (x0, y0, x1, y1), end exclusive.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors_qzoom import InputError


Box = tuple[int, int, int, int]
Rectangle = tuple[float, float, float, float]
ArtifactRule = Callable[[Tensor, Tensor | None], Tensor]

_CORNER_MIN_CELLS = 256
_FIRST_TOKEN_LIMIT = 0.75


def no_artifacts(probabilities: Tensor, first_token_logits: Tensor | None) -> Tensor:
    """The family's maps are clean."""
    return probabilities


def zero_page_corner(probabilities: Tensor, first_token_logits: Tensor | None) -> Tensor:
    """Qwen2.5-VL lights up the page's top left corner: zeroes the first column of the top quarter and the first row of
    the left quarter, on maps of more than 256 cells."""
    height, width = probabilities.shape
    if height * width <= _CORNER_MIN_CELLS:
        return probabilities
    cleaned = probabilities.clone()
    cleaned[: max(1, height // 4), 0] = 0
    cleaned[0, : max(1, width // 4)] = 0
    return cleaned


def zero_first_token_cells(probabilities: Tensor, first_token_logits: Tensor | None) -> Tensor:
    """Qwen3-VL: zeroes the cells whose keys resemble the first token's query, which are attention sinks."""
    if first_token_logits is None:
        raise InputError("this artifact rule needs the logits of the first token's query.")
    return probabilities.masked_fill(first_token_logits.sigmoid() >= _FIRST_TOKEN_LIMIT, 0)


def blur(heatmap: Tensor) -> Tensor:
    """3 × 3 Gaussian, sigma 1, mirrored at the border; a side of one cell is its own mirror image.

    Args:
        heatmap: (h, w).
    """
    tap = math.exp(-0.5)
    taps = torch.tensor([tap, 1.0, tap], dtype=heatmap.dtype, device=heatmap.device) / (1 + 2 * tap)
    height, width = heatmap.shape
    padded = F.pad(heatmap[None, None], (1, 1, 0, 0), mode="reflect" if width > 1 else "replicate")
    padded = F.pad(padded, (0, 0, 1, 1), mode="reflect" if height > 1 else "replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 3, 1))
    return F.conv2d(rows, taps.view(1, 1, 1, 3))[0, 0]


def region_heatmap(logits: Tensor, first_token_logits: Tensor | None, artifact_rule: ArtifactRule) -> Tensor:
    """Sigmoid, artifact rule and blur.

    Args:
        logits: (h, w) region logits.
        first_token_logits: (h, w) logits of the first token's query, for the rules that need them.
        artifact_rule: the backbone row's rule.

    Returns:
        (h, w) float32 values in [0, 1].
    """
    probabilities = artifact_rule(logits.float().sigmoid(), first_token_logits)
    return blur(probabilities)


def foreground_box(heatmap: Tensor, threshold: float, mode: str) -> Box | None:
    """One box round all cells above the threshold, in cells; None when there are none.

    Args:
        heatmap: (h, w).
        threshold: a heat-map value (`mode="absolute"`) or a share of the largest one (`mode="peak"`).
    """
    level = threshold * heatmap.max() if mode == "peak" else threshold
    rows, columns = torch.nonzero(heatmap > level, as_tuple=True)
    if rows.numel() == 0:
        return None
    x0, y0 = int(columns.min()), int(rows.min())
    return x0, y0, int(columns.max()) + 1, int(rows.max()) + 1


def _grow_and_slide(start: float, end: float, limit: int, min_side: int) -> tuple[int, int]:
    """Grows [start, end) about its centre to `min_side`, slides it inside [0, limit), truncates to whole pixels."""
    if end - start < min_side:
        centre = (start + end) / 2
        start, end = centre - min_side / 2, centre + min_side / 2
    if start < 0:
        start, end = 0.0, end - start
    if end > limit:
        start, end = start - (end - limit), float(limit)
    first = max(0, int(start))
    return first, max(first + 1, min(limit, int(end)))


def box_to_pixels(
    box: Box, grid: tuple[int, int], image_size: tuple[int, int], min_side: int, grid_box: Rectangle | None = None
) -> Box | None:
    """A box of cells in pixels of the source image.

    Args:
        box: (x0, y0, x1, y1) in cells.
        grid: (h, w) of the map.
        image_size: (H, W) of the source in pixels.
        min_side: smaller sides are grown to this many pixels, as far as the image allows.
        grid_box: the rectangle of source pixels that the grid covers; the whole image if None. Larger than the image
            where the coarse view was padded.

    Returns:
        The box, inside the image; None where all of it lies in the padding.
    """
    height, width = image_size
    left, top, right, bottom = (0, 0, width, height) if grid_box is None else grid_box
    # product before quotient: whole pixels come out whole, and truncation below keeps the last one
    # the padding around a source holds nothing to look at
    x0, x1 = (min(max(left + x * (right - left) / grid[1], 0.0), float(width)) for x in box[::2])
    y0, y1 = (min(max(top + y * (bottom - top) / grid[0], 0.0), float(height)) for y in box[1::2])
    if x0 == x1 or y0 == y1:
        return None
    first_x, end_x = _grow_and_slide(x0, x1, width, min_side)
    first_y, end_y = _grow_and_slide(y0, y1, height, min_side)
    return first_x, first_y, end_x, end_y


def pixels_to_cells(
    box: Box, grid: tuple[int, int], image_size: tuple[int, int], grid_box: Rectangle | None = None
) -> Rectangle:
    """The inverse of `box_to_pixels` without rounding: where a pixel box lies on the grid, in (fractional) cells."""
    height, width = image_size
    left, top, right, bottom = (0, 0, width, height) if grid_box is None else grid_box
    x_scale, y_scale = grid[1] / (right - left), grid[0] / (bottom - top)
    x0, y0, x1, y1 = box
    return (x0 - left) * x_scale, (y0 - top) * y_scale, (x1 - left) * x_scale, (y1 - top) * y_scale
