"""Varied pages as they come back from a scanner or a camera: a little askew, noisy, and compressed as JPEG."""

import io
import math
import random
from dataclasses import replace

from PIL import Image, ImageChops

from ...zoom_regions_qzoom import Box
from .pages import Entry, Page, to_box


MAX_DEGREES = 2.0
MAX_NOISE = 0.7
"""Largest strength of the noise: its standard deviation is 6.5 grey levels at 1."""
QUALITY = (45, 92)
"""Range of the JPEG quality."""
MIDDLE_GREY = 128
_SHARES = {"rotation": 0.7, "noise": 0.6, "jpeg": 0.7}


class _Turn:
    """A rotation around the page's middle, onto a canvas that holds all of it.

    Args:
        degrees: Counter-clockwise.
        size, turned: Sizes (width, height) of the page before and after.
    """

    def __init__(self, degrees: float, size: tuple[int, int], turned: tuple[int, int]) -> None:
        self.cosine, self.sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.size, self.turned = size, turned

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the page comes to lie; y points down."""
        x, y = x - self.size[0] / 2, y - self.size[1] / 2
        return (
            self.turned[0] / 2 + self.cosine * x + self.sine * y,
            self.turned[1] / 2 - self.sine * x + self.cosine * y,
        )

    def box(self, box: Box) -> Box:
        """The smallest upright box around a turned one."""
        x0, y0, x1, y1 = box
        xs, ys = zip(*(self.point(x, y) for x in (x0, x1) for y in (y0, y1)), strict=True)
        left, top, right, bottom = to_box((min(xs), min(ys), max(xs), max(ys)))
        return max(0, left), max(0, top), min(self.turned[0], right), min(self.turned[1], bottom)

    def entry(self, entry: Entry) -> Entry:
        """An entry with all its boxes where they come to lie."""
        return replace(
            entry,
            code_box=self.box(entry.code_box),
            digit_boxes=tuple(self.box(box) for box in entry.digit_boxes),
            mark=self.box(entry.mark),
            box=self.box(entry.box),
            line=self.box(entry.line),
        )


def turned_page(page: Page, degrees: float, paper: tuple[int, int, int]) -> Page:
    """The page turned counter-clockwise, and every box around what it held; the image grows so that nothing is cut.

    Args:
        paper: Colour of the new corners.
    """
    image = page.image.rotate(degrees, Image.Resampling.BILINEAR, expand=True, fillcolor=paper)
    turn = _Turn(degrees, page.image.size, image.size)
    bar = None if page.bar is None else (turn.box(page.bar[0]), page.bar[1])
    return replace(page, image=image, entries=tuple(turn.entry(entry) for entry in page.entries), bar=bar)


def _noisy(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """The image with grey noise, which depends on nothing but the seed and Python's own generator."""
    drawn = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height))
    # the sum of two even draws from 0 to 15 has the shape of a roof around 15
    levels = [MIDDLE_GREY + round(strength * ((byte & 15) + (byte >> 4) - 15)) for byte in range(256)]
    return ImageChops.add(image, Image.merge("RGB", 3 * (drawn.point(levels),)), offset=-MIDDLE_GREY)


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scanned_page(page: Page, rng: random.Random, paper: tuple[int, int, int]) -> Page:
    """The page after some of rotation, noise and compression, each as the seed has it.

    Args:
        paper: Colour of the page's paper.
    """
    if rng.random() < _SHARES["rotation"]:
        page = turned_page(page, rng.uniform(-MAX_DEGREES, MAX_DEGREES), paper)
    image = page.image
    if rng.random() < _SHARES["noise"]:
        image = _noisy(image, rng.uniform(0.1, MAX_NOISE), rng)
    if rng.random() < _SHARES["jpeg"]:
        image = _compressed(image, rng.randint(*QUALITY))
    return replace(page, image=image)
