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

from modeling_qzoom.data.drawn.pages import CODE_LENGTH, COLORS, SHAPES, WORDS, Box, Entry, Page


PATCH = 14
MERGE = 2
TOKEN = PATCH * MERGE
IGNORE = -100
IMAGE_MEAN, IMAGE_STD = 0.85, 0.3
"""Pages are mostly pale paper; centring on it keeps the first layer well conditioned."""
MIN_DIGIT_PIXELS = 7.5
"""Below this width in a view a digit counts as illegible and carries no dense label."""
MIN_LETTER_PIXELS = 5.0
"""The same for the letters of labels, which are words of a small vocabulary."""

NO_DIGIT = 10
NO_OBJECT = len(COLORS)
NO_WORD = len(WORDS)


@dataclass
class View:
    """One view and its labels.

    Args:
        patches: (4 * h * w, 3 * 14 * 14) uint8, in the order of Qwen's image processor, one temporal copy.
        grid: Merged grid (h, w).
        box: The view's rectangle in page pixels.
        digit: (4 * h * w,) the digit under each patch, 10 for none.
        color: (h * w,) colour of the shape or bar under each token, 6 for none.
        shape: (h * w,) shape of the object under each token, 6 for none.
        word: (h * w,) label word under each token, 16 for none.
        code: (h * w, 3) the whole code for each token that touches a code, else ignored.
        legible: Indices of the page's entries whose mark and legible code lie inside the view.
    """

    patches: torch.Tensor
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    digit: torch.Tensor
    color: torch.Tensor
    shape: torch.Tensor
    word: torch.Tensor
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
    """uint8 patches (n, 588) to normalised values (n, 588), one temporal copy."""
    return patches.float().div_(255 * IMAGE_STD).sub_(IMAGE_MEAN / IMAGE_STD)


def _overlap(centres: np.ndarray, size: float, lo: float, hi: float) -> np.ndarray:
    """Share of each interval (centre, size) that lies inside [lo, hi]."""
    return np.clip(np.minimum(centres + size / 2, hi) - np.maximum(centres - size / 2, lo), 0, None) / size


class _Labels:
    """Dense labels of one view while they are filled in.

    Args:
        box: The view's rectangle in page pixels.
        grid: Merged grid (h, w).
    """

    def __init__(self, box: tuple[float, float, float, float], grid: tuple[int, int]) -> None:
        h, w = grid
        self.left, self.top = box[0], box[1]
        self.width, self.height = w * TOKEN, h * TOKEN
        self.sx, self.sy = self.width / (box[2] - box[0]), self.height / (box[3] - box[1])
        self.color, self.shape = np.full((h, w), NO_OBJECT), np.full((h, w), NO_OBJECT)
        self.word = np.full((h, w), NO_WORD)
        self.code = np.full((h, w, CODE_LENGTH), IGNORE)
        self.digit = np.full((2 * h, 2 * w), NO_DIGIT)

    def project(self, b: Box) -> tuple[float, float, float, float]:
        """A box of page pixels in pixels of the view."""
        left, top = self.left, self.top
        return (b[0] - left) * self.sx, (b[1] - top) * self.sy, (b[2] - left) * self.sx, (b[3] - top) * self.sy

    def cover(self, b: tuple[float, float, float, float], step: int) -> np.ndarray:
        """Share of each square of `step` pixels that lies inside a projected box."""
        ys = (np.arange(self.height // step) + 0.5) * step
        xs = (np.arange(self.width // step) + 0.5) * step
        return np.outer(_overlap(ys, step, b[1], b[3]), _overlap(xs, step, b[0], b[2]))

    def visible(self, b: Box) -> bool:
        """Whether a box of page pixels lies inside the view."""
        x0, y0, x1, y1 = self.project(b)
        return x0 >= -1 and y0 >= -1 and x1 <= self.width + 1 and y1 <= self.height + 1

    def add_bar(self, bar: tuple[Box, str]) -> None:
        """Colour of a bar."""
        share = self.cover(self.project(bar[0]), TOKEN)
        self.color[share > 0.02] = np.where(share[share > 0.02] > 0.3, list(COLORS).index(bar[1]), IGNORE)

    def add_mark(self, entry: Entry) -> bool:
        """Labels of an entry's shape or word; whether it can be recognised."""
        outline = self.project(entry.mark)
        share = self.cover(outline, TOKEN)
        area = (outline[2] - outline[0]) * (outline[3] - outline[1])
        whole = share.sum() * TOKEN**2 / area > (0.7 if entry.word is None else 0.95)
        if not share.any():
            return False
        if entry.word is not None:
            clear = whole and (outline[2] - outline[0]) / len(entry.word) >= MIN_LETTER_PIXELS
            self.word[share > 0.02] = IGNORE
            if clear:
                self.word[share > 0.12] = WORDS.index(entry.word)
            return clear
        inner = (
            outline[0] * 0.8 + outline[2] * 0.2, outline[1] * 0.8 + outline[3] * 0.2,
            outline[0] * 0.2 + outline[2] * 0.8, outline[1] * 0.2 + outline[3] * 0.8,
        )  # fmt: skip
        sure = (self.cover(inner, TOKEN) > 0.4) | (self.cover(self.project(entry.code_box), TOKEN) > 0.12)
        self.color[(share > 0.02) & ~sure] = self.shape[(share > 0.02) & ~sure] = IGNORE
        assert entry.color is not None and entry.shape is not None  # a scene's entries have both
        self.color[sure] = list(COLORS).index(entry.color) if whole else IGNORE
        self.shape[sure] = SHAPES.index(entry.shape) if whole else IGNORE
        return whole

    def add_code(self, entry: Entry) -> bool:
        """Labels of an entry's code; whether all of it can be read."""
        legible = entry.digit_width * min(self.sx, self.sy) >= MIN_DIGIT_PIXELS
        for place, glyph in enumerate(entry.digit_boxes):
            at = self.cover(self.project(glyph), PATCH)
            value = int(entry.code[place]) if legible else IGNORE
            self.digit[at > 0.02] = np.where(at[at > 0.02] > 0.3, value, IGNORE)
        readable = legible and self.visible(entry.code_box)
        if readable:
            plate = self.cover(self.project(entry.code_box), TOKEN) > 0.12
            self.code[plate] = [int(d) for d in entry.code]
        return readable


def make_view(page: Page, box: tuple[float, float, float, float], grid: tuple[int, int]) -> View:
    """Render a rectangle of a page at a grid and derive its dense labels."""
    h, w = grid
    labels = _Labels(box, grid)
    if page.bar is not None:
        labels.add_bar(page.bar)
    legible = []
    for index, entry in enumerate(page.entries):
        marked = labels.add_mark(entry)
        if labels.add_code(entry) and marked:
            legible.append(index)
    merged = labels.digit.reshape(h, 2, w, 2).transpose(0, 2, 1, 3).reshape(-1)
    return View(
        patches=to_patches(page.image, grid, box),
        grid=grid,
        box=box,
        digit=torch.from_numpy(merged),
        color=torch.from_numpy(labels.color.reshape(-1)),
        shape=torch.from_numpy(labels.shape.reshape(-1)),
        word=torch.from_numpy(labels.word.reshape(-1)),
        code=torch.from_numpy(labels.code.reshape(-1, CODE_LENGTH)),
        legible=tuple(legible),
    )


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
        tokens: The most it may take.
        box: What it is to hold, the entry's own box by default.
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
        coarse: Merged grid (h, w) of the whole page.

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
    box = (cells[0] * cell_w, cells[1] * cell_h, cells[2] * cell_w, cells[3] * cell_h)
    # the network's own crops are truncated to whole pixels
    box = (float(int(box[0])), float(int(box[1])), float(int(box[2])), float(int(box[3])))
    grid = fit_grid(box[2] - box[0], box[3] - box[1], 4, max_tokens)
    return make_view(page, box, grid), cells
