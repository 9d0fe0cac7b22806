"""Foveation: above layer K, a row that zooms keeps only those coarse tokens that its heat map cares for."""

import math

import torch
from torch import Tensor

from .zoom_regions_qzoom import Rectangle


def kept_cells(heatmap: Tensor, cells: Rectangle, share: float, margin: int) -> Tensor | None:
    """Which coarse tokens of the zoomed image stay above layer K.

    Args:
        heatmap: (h, w).
        cells: (x0, y0, x1, y1) of the region in cells of the grid, end exclusive; may be fractional.
        share: ⌈share · h · w⌉ tokens are kept.
        margin: cells around the region. These and the region's own come first, then the hottest of the others.

    Returns:
        (h, w) bool on the CPU; None where all are kept.
    """
    height, width = heatmap.shape
    if share >= 1:
        return None
    x0, y0, x1, y1 = cells
    ranks = heatmap.float().cpu().clone()
    rows = slice(max(math.floor(y0) - margin, 0), math.ceil(y1) + margin)
    columns = slice(max(math.floor(x0) - margin, 0), math.ceil(x1) + margin)
    ranks[rows, columns] += 1 + float(ranks.max() - ranks.min())
    kept = torch.zeros(height * width, dtype=torch.bool)
    order = ranks.flatten().argsort(descending=True, stable=True)
    kept[order[: math.ceil(share * height * width)]] = True
    return kept.view(height, width)
