"""Dense labels of a view, known from the drawing: digit, colour, shape, word and code under each patch and token."""

import numpy as np
import torch
from torch import Tensor

from hub_release.demo.backbone.model import MERGE, PATCH, TOKEN
from modeling_qzoom.data.drawn.pages import CODE_LENGTH, COLORS, SHAPES, WORDS, Entry, Page
from modeling_qzoom.training_losses_qzoom import IGNORED
from modeling_qzoom.zoom_regions_qzoom import Box


# below this width in a view a digit counts as illegible and carries no label
MIN_DIGIT_PIXELS = 7.5
# the same for the letters of label words, which are few
MIN_LETTER_PIXELS = 5.0
# the label of places where there is nothing of the sort
NOTHING = {"digit": 10, "color": len(COLORS), "shape": len(SHAPES), "word": len(WORDS)}
# (x0, y0, x1, y1) in pixels of a page or a view, end exclusive
Rectangle = tuple[float, float, float, float]


def _overlap(centres: np.ndarray, size: float, lo: float, hi: float) -> np.ndarray:
    """Share of each interval (centre, size) that lies inside [lo, hi]."""
    return np.clip(np.minimum(centres + size / 2, hi) - np.maximum(centres - size / 2, lo), 0, None) / size


class _DrawnLabels:
    """Dense labels of one view while they are filled in.

    Args:
        box: the view's rectangle in page pixels.
        grid: merged grid (h, w).
    """

    def __init__(self, box: Rectangle, grid: tuple[int, int]) -> None:
        h, w = grid
        self.left, self.top = box[0], box[1]
        self.width, self.height = w * TOKEN, h * TOKEN
        self.sx, self.sy = self.width / (box[2] - box[0]), self.height / (box[3] - box[1])
        self.color, self.shape = np.full((h, w), NOTHING["color"]), np.full((h, w), NOTHING["shape"])
        self.word = np.full((h, w), NOTHING["word"])
        self.code = np.full((h, w, CODE_LENGTH), IGNORED)
        self.digit = np.full((MERGE * h, MERGE * w), NOTHING["digit"])

    def project(self, b: Box) -> Rectangle:
        """A box of page pixels in pixels of the view."""
        left, top = self.left, self.top
        return (b[0] - left) * self.sx, (b[1] - top) * self.sy, (b[2] - left) * self.sx, (b[3] - top) * self.sy

    def cover(self, b: Rectangle, step: int) -> np.ndarray:
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
        self.color[share > 0.02] = np.where(share[share > 0.02] > 0.3, list(COLORS).index(bar[1]), IGNORED)

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
            self.word[share > 0.02] = IGNORED
            if clear:
                self.word[share > 0.12] = WORDS.index(entry.word)
            return clear
        inner = (
            outline[0] * 0.8 + outline[2] * 0.2, outline[1] * 0.8 + outline[3] * 0.2,
            outline[0] * 0.2 + outline[2] * 0.8, outline[1] * 0.2 + outline[3] * 0.8,
        )  # fmt: skip
        sure = (self.cover(inner, TOKEN) > 0.4) | (self.cover(self.project(entry.code_box), TOKEN) > 0.12)
        self.color[(share > 0.02) & ~sure] = self.shape[(share > 0.02) & ~sure] = IGNORED
        assert entry.color is not None and entry.shape is not None  # a scene's entries have both
        self.color[sure] = list(COLORS).index(entry.color) if whole else IGNORED
        self.shape[sure] = SHAPES.index(entry.shape) if whole else IGNORED
        return whole

    def add_code(self, entry: Entry) -> bool:
        """Labels of an entry's code; whether all of it can be read."""
        legible = entry.digit_width * min(self.sx, self.sy) >= MIN_DIGIT_PIXELS
        for place, glyph in enumerate(entry.digit_boxes):
            at = self.cover(self.project(glyph), PATCH)
            value = int(entry.code[place]) if legible else IGNORED
            self.digit[at > 0.02] = np.where(at[at > 0.02] > 0.3, value, IGNORED)
        readable = legible and self.visible(entry.code_box)
        if readable:
            plate = self.cover(self.project(entry.code_box), TOKEN) > 0.12
            self.code[plate] = [int(d) for d in entry.code]
        return readable


def label_view(page: Page, box: Rectangle, grid: tuple[int, int]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Labels of a rectangle of a page that is seen as a grid of merged tokens.

    Args:
        box: the rectangle in page pixels.
        grid: merged grid (h, w).

    Returns:
        The labels by name, and the indices of the page's entries whose mark and code can both be read:
        "digit", (4 * h * w,) in the order of the patches; "color" of the shape or bar, "shape" and "word", (h * w,);
        "code", (h * w, 3), all of the code for each token that touches it. `IGNORED` where nothing can be said,
        `NOTHING` where there is nothing of the sort.
    """
    h, w = grid
    drawn = _DrawnLabels(box, grid)
    if page.bar is not None:
        drawn.add_bar(page.bar)
    legible = []
    for index, entry in enumerate(page.entries):
        marked = drawn.add_mark(entry)
        if drawn.add_code(entry) and marked:
            legible.append(index)
    labels = {
        "digit": drawn.digit.reshape(h, MERGE, w, MERGE).transpose(0, 2, 1, 3).reshape(-1),
        "color": drawn.color.reshape(-1),
        "shape": drawn.shape.reshape(-1),
        "word": drawn.word.reshape(-1),
        "code": drawn.code.reshape(-1, CODE_LENGTH),
    }
    return {name: torch.from_numpy(values) for name, values in labels.items()}, tuple(legible)
