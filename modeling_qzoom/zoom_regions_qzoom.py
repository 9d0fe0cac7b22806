"""From region logits to a box of source pixels (paper III-C, eq. 6 and 7).

Conventions: maps are (height, width) in merged visual tokens, "cells"; boxes are (x0, y0, x1, y1), end exclusive.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors_qzoom import InputError
from .zoom_options_qzoom import ZoomOptions


Box = tuple[int, int, int, int]
Rectangle = tuple[float, float, float, float]
ArtifactRule = Callable[[Tensor, Tensor | None], Tensor]

_CORNER_MIN_CELLS = 256
_FIRST_TOKEN_LIMIT = 0.75
_LEAST_MEAN = 1e-8  # a map of zeros has no contrast, and no error


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


def grid_sigma(cells: int) -> float:
    """Sigma of a blur that keeps pace with the grid, in cells: the larger the grid, the more its maps speckle.

    1 up to 512 cells, straight on to 2 at 2048, then with the grid's side to 4 at 8192 (Vision-RL²).

    Args:
        cells: number of cells of the grid.
    """
    if cells > 2048:
        return min(2 * math.sqrt(cells / 2048), 4.0)
    return min(max(1 + (cells - 512) / 1536, 1.0), 2.0)


def _blur_taps(sigma: float, side: int) -> list[float]:
    """Weights of a Gaussian along one axis of `side` cells, about three sigma wide in all, outermost first; not
    normalised. A kernel that reached beyond the mirror image of a side is narrowed to it."""
    reach = min(max(3, round(3 * sigma)) // 2, side - 1)
    outer = [math.exp(-(distance**2) / (2 * sigma**2)) for distance in range(reach, 0, -1)]
    return [*outer, 1.0, *outer[::-1]]


def blur(heatmap: Tensor, sigma: float = 1.0) -> Tensor:
    """Gaussian blur, mirrored at the border; a side of one cell is its own mirror image. 3 × 3 for sigma 1.

    Args:
        heatmap: (h, w).
        sigma: in cells.
    """
    height, width = heatmap.shape
    columns, rows = _blur_taps(sigma, height), _blur_taps(sigma, width)  # along the columns, along the rows
    across, down = len(rows) // 2, len(columns) // 2
    blurred = F.pad(heatmap[None, None], (across, across, down, down), mode="reflect")
    for taps, shape in ((columns, (1, 1, -1, 1)), (rows, (1, 1, 1, -1))):
        weights = torch.tensor(taps, dtype=heatmap.dtype, device=heatmap.device)
        weights = weights / (1 + 2 * sum(taps[: len(taps) // 2]))
        blurred = F.conv2d(blurred, weights.view(shape))
    return blurred[0, 0]


def region_heatmap(
    logits: Tensor, first_token_logits: Tensor | None, artifact_rule: ArtifactRule, sigma: float = 1.0
) -> Tensor:
    """Sigmoid, artifact rule and blur.

    Args:
        logits: (h, w) region logits.
        first_token_logits: (h, w) logits of the first token's query, for the rules that need them.
        artifact_rule: the backbone row's rule.
        sigma: of the blur, in cells.

    Returns:
        (h, w) float32 values in [0, 1].
    """
    probabilities = artifact_rule(logits.float().sigmoid(), first_token_logits)
    return blur(probabilities, sigma)


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


def find_region(heatmap: Tensor, options: ZoomOptions) -> tuple[Box | None, str | None]:
    """The box of a heat map under the options' region rules.

    A map must first reach `region_min_peak` and `region_min_contrast`; its mean is that of all its cells.

    Args:
        heatmap: (h, w).

    Returns:
        The box in cells, and the name of the option whose rule the map fails: one of them is None.
    """
    peak, mean = float(heatmap.max()), float(heatmap.mean())
    if peak < options.region_min_peak:
        return None, "region_min_peak"
    if peak / (mean + _LEAST_MEAN) < options.region_min_contrast:
        return None, "region_min_contrast"
    box = foreground_box(heatmap, options.region_threshold, options.region_threshold_mode)
    return box, "region_threshold" if box is None else None


def _grow_and_slide(edges: Tensor, limit: int, min_side: int) -> tuple[int, int]:
    """Grows two edges about their centre to `min_side`, slides them inside [0, limit], truncates to whole pixels."""
    grown = (min_side - (edges[1] - edges[0])).clamp(min=0) / 2
    edges = edges + torch.stack([-grown, grown])
    edges = edges - edges[0].clamp(max=0)
    edges = edges - (edges[1] - limit).clamp(min=0)
    first, end = edges.clamp(0, limit).long().tolist()
    return first, max(first + 1, end)


def box_to_pixels(
    box: Box,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    min_side: int,
    grid_box: Rectangle | None = None,
    cell_side: int = 28,
) -> Box | None:
    """A box of cells in pixels of the source image.

    Computed and truncated in float32 as the authors do, so that crops are theirs to the pixel: an edge that exact
    arithmetic puts on a whole pixel may come out one lower.

    Args:
        box: (x0, y0, x1, y1) in cells.
        grid: (h, w) of the map.
        image_size: (H, W) of the source in pixels.
        min_side: smaller sides are grown to this many pixels, as far as the image allows.
        grid_box: the rectangle of source pixels that the grid covers; the whole image if None. Larger than the image
            where the coarse view was padded.
        cell_side: side of a cell in pixels of the coarse view.

    Returns:
        The box, inside the image; None where all of it lies in the padding.
    """
    height, width = image_size
    left, top, right, bottom = (0, 0, width, height) if grid_box is None else grid_box
    sides = []
    for cells, count, start, end, limit in (
        (box[::2], grid[1], left, right, width),
        (box[1::2], grid[0], top, bottom, height),
    ):
        # the order of the two products decides how they round
        in_view = torch.tensor(cells, dtype=torch.float32, device="cpu") * cell_side
        edges = start + in_view * ((end - start) / (cell_side * count))
        edges = edges.clamp(0, limit)  # the padding around a source holds nothing to look at
        if edges[0] == edges[1]:
            return None
        sides.append(_grow_and_slide(edges, limit, min_side))
    (x0, x1), (y0, y1) = sides
    return x0, y0, x1, y1


def pixels_to_cells(
    box: Box, grid: tuple[int, int], image_size: tuple[int, int], grid_box: Rectangle | None = None
) -> Rectangle:
    """The inverse of `box_to_pixels` without rounding: where a pixel box lies on the grid, in (fractional) cells."""
    height, width = image_size
    left, top, right, bottom = (0, 0, width, height) if grid_box is None else grid_box
    x_scale, y_scale = grid[1] / (right - left), grid[0] / (bottom - top)
    x0, y0, x1, y1 = box
    return (x0 - left) * x_scale, (y0 - top) * y_scale, (x1 - left) * x_scale, (y1 - top) * y_scale
