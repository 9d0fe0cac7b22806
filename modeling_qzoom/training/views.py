"""Views of drawn pages as the vision tower sees them, with dense labels known from the drawing.

A view is a rectangle of a page, resized to a grid of merged tokens. "Tokens" are merged visual tokens of `TOKEN`
pixels a side; each consists of 2 x 2 patches.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..evaluation.synthetic import COLORS, SHAPES, Box, Page


PATCH = 14
MERGE = 2
TOKEN = PATCH * MERGE
IGNORE = -100
IMAGE_MEAN, IMAGE_STD = 0.85, 0.3
"""Pages are mostly pale paper; centring on it keeps the first layer well conditioned."""
MIN_DIGIT_PIXELS = 7.5
"""Below this width in a view a digit counts as illegible and carries no dense label."""

NO_DIGIT = 10
NO_OBJECT = len(COLORS)


@dataclass
class View:
    """One view and its labels.

    Args:
        patches: (4 * h * w, 3 * 14 * 14) uint8, in the order of Qwen's image processor, one temporal copy.
        grid: Merged grid (h, w).
        box: The view's rectangle in page pixels.
        digit: (4 * h * w,) the digit under each patch, 10 for none.
        color: (h * w,) colour of the object under each token, 6 for none.
        shape: (h * w,) shape of the object under each token, 6 for none.
        code: (h * w, 3) the whole code for each token that touches a plate, else ignored.
        legible: Indices of the page's items whose shape and legible code lie inside the view.
    """

    patches: torch.Tensor
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    digit: torch.Tensor
    color: torch.Tensor
    shape: torch.Tensor
    code: torch.Tensor
    legible: tuple[int, ...]


def fit_grid(width: float, height: float, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Merged grid (h, w) that Qwen's processor gives an image of this size under a token budget."""
    h, w = max(1, round(height / TOKEN)), max(1, round(width / TOKEN))
    if h * w > max_tokens:
        beta = math.sqrt(width * height / (max_tokens * TOKEN**2))
        return max(1, math.floor(height / beta / TOKEN)), max(1, math.floor(width / beta / TOKEN))
    if h * w < min_tokens:
        beta = math.sqrt(min_tokens * TOKEN**2 / (width * height))
        return math.ceil(height * beta / TOKEN), math.ceil(width * beta / TOKEN)
    return h, w


def to_patches(image: Image.Image, grid: tuple[int, int], box: tuple[float, float, float, float]) -> torch.Tensor:
    """Resize a rectangle of an image to a grid of tokens and cut it into patches: (4 * h * w, 588) uint8."""
    h, w = grid
    pixels = np.asarray(image.resize((w * TOKEN, h * TOKEN), Image.Resampling.BICUBIC, box=box))
    cut = pixels.reshape(h, MERGE, PATCH, w, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return torch.from_numpy(np.ascontiguousarray(cut)).reshape(h * w * MERGE**2, 3 * PATCH**2)


def normalise(patches: torch.Tensor) -> torch.Tensor:
    """uint8 patches (n, 588) to the tower's input (n, 3 * 2 * 14 * 14): normalised, two temporal copies."""
    values = patches.float().div_(255 * IMAGE_STD).sub_(IMAGE_MEAN / IMAGE_STD).view(-1, 3, 1, PATCH * PATCH)
    return values.expand(-1, 3, 2, -1).reshape(len(patches), -1)


def _overlap(centres: np.ndarray, size: float, lo: float, hi: float) -> np.ndarray:
    """Share of each interval (centre, size) that lies inside [lo, hi]."""
    return np.clip(np.minimum(centres + size / 2, hi) - np.maximum(centres - size / 2, lo), 0, None) / size


def make_view(page: Page, box: tuple[float, float, float, float], grid: tuple[int, int]) -> View:
    """Render a rectangle of a page at a grid and derive its dense labels."""
    h, w = grid
    x0, y0, x1, y1 = box
    sx, sy = w * TOKEN / (x1 - x0), h * TOKEN / (y1 - y0)
    legible = page.digit_width * min(sx, sy) >= MIN_DIGIT_PIXELS
    color = np.full((h, w), NO_OBJECT)
    shape = np.full((h, w), NO_OBJECT)
    code = np.full((h, w, 3), IGNORE)
    digit = np.full((2 * h, 2 * w), NO_DIGIT if legible else IGNORE)

    def project(b: Box) -> tuple[float, float, float, float]:
        return (b[0] - x0) * sx, (b[1] - y0) * sy, (b[2] - x0) * sx, (b[3] - y0) * sy

    def cover(b: tuple[float, float, float, float], step: int) -> np.ndarray:
        ys = (np.arange(h * TOKEN // step) + 0.5) * step
        xs = (np.arange(w * TOKEN // step) + 0.5) * step
        return np.outer(_overlap(ys, step, b[1], b[3]), _overlap(xs, step, b[0], b[2]))

    readable = []
    for index, item in enumerate(page.items):
        outline = project(item.box)
        share = cover(outline, TOKEN)
        if not share.any():
            continue
        area = (outline[2] - outline[0]) * (outline[3] - outline[1])
        whole = share.sum() * TOKEN**2 / area > 0.7
        inner = (
            outline[0] * 0.8 + outline[2] * 0.2, outline[1] * 0.8 + outline[3] * 0.2,
            outline[0] * 0.2 + outline[2] * 0.8, outline[1] * 0.2 + outline[3] * 0.8,
        )  # fmt: skip
        inside, touched = cover(inner, TOKEN) > 0.4, share > 0.02
        plate = cover(project(item.code_box), TOKEN) > 0.12
        sure = inside | plate
        color[touched & ~sure] = shape[touched & ~sure] = IGNORE
        color[sure] = list(COLORS).index(item.color) if whole else IGNORE
        shape[sure] = SHAPES.index(item.shape) if whole else IGNORE
        inner_code = project(item.code_box)
        if not legible:
            continue
        visible = inner_code[0] >= -1 and inner_code[2] <= w * TOKEN + 1
        visible = visible and inner_code[1] >= -1 and inner_code[3] <= h * TOKEN + 1
        if visible:
            code[plate] = [int(d) for d in item.code]
            if whole:
                readable.append(index)
        for place, glyph in enumerate(item.digit_boxes):
            at = cover(project(glyph), PATCH)
            digit[at > 0.02] = np.where(at[at > 0.02] > 0.3, int(item.code[place]), IGNORE)
    merged = digit.reshape(h, 2, w, 2).transpose(0, 2, 1, 3).reshape(-1)
    return View(
        patches=to_patches(page.image, grid, box),
        grid=grid,
        box=box,
        digit=torch.from_numpy(merged),
        color=torch.from_numpy(color.reshape(-1)),
        shape=torch.from_numpy(shape.reshape(-1)),
        code=torch.from_numpy(code.reshape(-1, 3)),
        legible=tuple(readable),
    )


def whole_view(page: Page, max_tokens: int) -> View:
    """The whole page under a token budget."""
    width, height = page.image.size
    return make_view(page, (0, 0, width, height), fit_grid(width, height, max_tokens // 2, max_tokens))


def item_view(page: Page, index: int, tokens: int, rng: random.Random, digits: tuple[float, float]) -> View:
    """A crop around one item's code such that a digit is `digits` pixels wide in the view."""
    h = w = max(2, round(math.sqrt(tokens)))
    if rng.random() < 0.5:
        h, w = max(2, h + rng.randint(-1, 1)), max(2, w + rng.randint(-1, 1))
    x0, y0, x1, y1 = page.items[index].code_box
    target = rng.uniform(*digits)
    # the whole code has to fit: three digits of 1.3 widths each and a margin
    target = min(target, w * TOKEN / 5.0)
    scale = target / page.digit_width
    side_w, side_h = w * TOKEN / scale, h * TOKEN / scale
    width, height = page.image.size
    side_w, side_h = min(side_w, width), min(side_h, height)
    slack_x, slack_y = max(0.0, side_w - (x1 - x0)) / 2 * 0.9, max(0.0, side_h - (y1 - y0)) / 2 * 0.9
    cx = (x0 + x1) / 2 + rng.triangular(-slack_x, slack_x, 0)
    cy = (y0 + y1) / 2 + rng.triangular(-slack_y, slack_y, 0)
    left = min(max(0.0, cx - side_w / 2), width - side_w)
    top = min(max(0.0, cy - side_h / 2), height - side_h)
    return make_view(page, (left, top, left + side_w, top + side_h), (h, w))


def cell_crop(
    page: Page, index: int, coarse: tuple[int, int], max_tokens: int, rng: random.Random
) -> tuple[View, Box]:
    """A crop as inference makes it: a rectangle of coarse cells around one item's code, under a token budget.

    Args:
        coarse: Merged grid (h, w) of the whole page.

    Returns:
        The view, and its box (x0, y0, x1, y1) in coarse cells, exclusive end.
    """
    width, height = page.image.size
    cell_w, cell_h = width / coarse[1], height / coarse[0]
    x0, y0, x1, y1 = page.items[index].code_box
    margin = rng.choice([0.0, 0.2, 0.5, 0.9, 1.2])
    cells = (
        max(0, math.floor(x0 / cell_w - rng.uniform(0, 1.6) * margin)),
        max(0, math.floor(y0 / cell_h - rng.uniform(0, 1.6) * margin)),
        min(coarse[1], math.ceil(x1 / cell_w + rng.uniform(0, 1.6) * margin)),
        min(coarse[0], math.ceil(y1 / cell_h + rng.uniform(0, 1.6) * margin)),
    )
    box = (cells[0] * cell_w, cells[1] * cell_h, cells[2] * cell_w, cells[3] * cell_h)
    # the network's own crops are truncated to whole pixels
    box = tuple(float(int(edge)) for edge in box)
    grid = fit_grid(box[2] - box[0], box[3] - box[1], 4, max_tokens)
    return make_view(page, box, grid), cells
