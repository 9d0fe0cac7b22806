"""Views of drawn pages as the vision tower sees them: a rectangle of a page, resized to a grid of merged tokens."""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hub_release.demo.backbone.dense_labels import Rectangle, label_view
from hub_release.demo.backbone.model import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH, TEMPORAL_PATCH, TOKEN
from modeling_qzoom.backbone_grids_qzoom import NativeGrid
from modeling_qzoom.data.drawn.pages import Page
from modeling_qzoom.zoom_regions_qzoom import Box


@dataclass
class View:
    """One view of a page, and what is drawn on it.

    Attributes:
        patches: (4 * h * w, 3 * 14 * 14) uint8, in the order of Qwen's image processor, one temporal copy.
        grid: merged grid (h, w).
        box: the view's rectangle in page pixels.
        labels: dense labels by name, see `dense_labels.label_view`.
        legible: indices of the page's entries whose mark and code can be read in the view.
    """

    patches: Tensor
    grid: tuple[int, int]
    box: Rectangle
    labels: dict[str, Tensor]
    legible: tuple[int, ...]


def fit_grid(width: int, height: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Merged grid (h, w) that an image of this size gets under a token budget, by the library's own rule."""
    grid = NativeGrid(PATCH, MERGE, TEMPORAL_PATCH)
    return grid.crop_tokens(grid.crop_size(height, width, min_tokens * TOKEN**2, max_tokens * TOKEN**2))


def to_patches(image: Image.Image, grid: tuple[int, int], box: Rectangle) -> Tensor:
    """Resizes a rectangle of an image to a grid of tokens and cuts it into patches: (4 * h * w, 588) uint8."""
    h, w = grid
    pixels = np.asarray(image.resize((w * TOKEN, h * TOKEN), Image.Resampling.BICUBIC, box=box))
    cut = pixels.reshape(h, MERGE, PATCH, w, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return torch.from_numpy(np.ascontiguousarray(cut)).reshape(h * w * MERGE**2, 3 * PATCH**2)


def normalise(patches: Tensor) -> Tensor:
    """uint8 patches (n, 588) to normalised values (n, 588), one temporal copy."""
    return patches.float().div_(255 * IMAGE_STD).sub_(IMAGE_MEAN / IMAGE_STD)


def make_view(page: Page, box: Rectangle, grid: tuple[int, int]) -> View:
    """Renders a rectangle of a page at a grid and labels it."""
    labels, legible = label_view(page, box, grid)
    return View(to_patches(page.image, grid, box), grid, box, labels, legible)


def whole_view(page: Page, max_tokens: int) -> View:
    """The whole page under a token budget."""
    width, height = page.image.size
    return make_view(page, (0, 0, width, height), fit_grid(width, height, max_tokens // 2, max_tokens))


def code_view(page: Page, index: int, tokens: int, rng: random.Random, digits: tuple[float, float]) -> View:
    """A view around one code such that a digit is `digits` pixels wide; its mark may be cut off."""
    h = w = max(2, round(math.sqrt(tokens)))
    if rng.random() < 0.5:
        h, w = max(2, h + rng.randint(-1, 1)), max(2, w + rng.randint(-1, 1))
    entry = page.entries[index]
    # the whole code has to fit: three digits of 1.3 widths each and a margin
    scale = min(rng.uniform(*digits), w * TOKEN / 5.0) / entry.digit_width
    return _placed_view(page, entry.code_box, (h, w), scale, rng)


def entry_view(
    page: Page, index: int, tokens: int, rng: random.Random, digits: tuple[float, float], box: Box | None = None
) -> View | None:
    """A view that holds an entry, mark and code, with digits `digits` pixels wide; None where that takes too many.

    Args:
        tokens: most tokens that the view may take.
        box: rectangle of page pixels that it shows whole, the entry's own box by default.
    """
    entry = page.entries[index]
    box = box or entry.box
    scale = rng.uniform(*digits) / entry.digit_width
    width, height = box[2] - box[0], box[3] - box[1]
    h = math.ceil(height * scale / TOKEN * rng.uniform(1.0, 1.3))
    w = math.ceil(width * scale / TOKEN * rng.uniform(1.0, 1.3))
    if h * w > tokens:
        return None
    return _placed_view(page, box, (max(2, h), max(2, w)), scale, rng)


def _placed_view(page: Page, target: Box, grid: tuple[int, int], scale: float, rng: random.Random) -> View:
    """A view of a grid at a scale, placed at random around a box."""
    x0, y0, x1, y1 = target
    width, height = page.image.size
    side_w, side_h = min(grid[1] * TOKEN / scale, width), min(grid[0] * TOKEN / scale, height)
    slack_x, slack_y = max(0.0, side_w - (x1 - x0)) / 2 * 0.9, max(0.0, side_h - (y1 - y0)) / 2 * 0.9
    cx = (x0 + x1) / 2 + rng.triangular(-slack_x, slack_x, 0)
    cy = (y0 + y1) / 2 + rng.triangular(-slack_y, slack_y, 0)
    left = min(max(0.0, cx - side_w / 2), width - side_w)
    top = min(max(0.0, cy - side_h / 2), height - side_h)
    return make_view(page, (left, top, left + side_w, top + side_h), grid)


def cell_crop(
    page: Page, target: Box, coarse: tuple[int, int], max_tokens: int, rng: random.Random
) -> tuple[View, Box]:
    """A crop as inference makes it: a rectangle of coarse cells around a box of pixels, under a token budget.

    Args:
        coarse: merged grid (h, w) of the whole page.

    Returns:
        The view, and its box (x0, y0, x1, y1) in coarse cells, exclusive end.
    """
    width, height = page.image.size
    cell_w, cell_h = width / coarse[1], height / coarse[0]
    x0, y0, x1, y1 = target
    margin = rng.choice([0.0, 0.2, 0.5, 0.9, 1.2])
    cells = (
        max(0, math.floor(x0 / cell_w - rng.uniform(0, 1.6) * margin)),
        max(0, math.floor(y0 / cell_h - rng.uniform(0, 1.6) * margin)),
        min(coarse[1], math.ceil(x1 / cell_w + rng.uniform(0, 1.6) * margin)),
        min(coarse[0], math.ceil(y1 / cell_h + rng.uniform(0, 1.6) * margin)),
    )
    # the network's own crops are truncated to whole pixels
    left, right = int(cells[0] * cell_w), int(cells[2] * cell_w)
    top, bottom = int(cells[1] * cell_h), int(cells[3] * cell_h)
    grid = fit_grid(right - left, bottom - top, 4, max_tokens)
    return make_view(page, (left, top, right, bottom), grid), cells
