"""What every drawn page is made of: entries that carry a code, questions, fonts and the drawing of codes.

Boxes are (x0, y0, x1, y1) in page pixels, exclusive end. Lengths given as shares are shares of the page's longer side.
"""

import math
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ...zoom_regions_qzoom import Box
from .fonts import TYPEFACES, load_font
from .looks import CODE_PATTERNS, VARIETIES, Look


COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (38, 150, 70),
    "blue": (40, 90, 210),
    "yellow": (240, 205, 40),
    "purple": (130, 55, 175),
    "orange": (240, 130, 30),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross")
WORDS: tuple[str, ...] = (
    "name", "date", "total", "tax", "city", "phone", "price", "order",
    "room", "item", "size", "year", "rate", "bank", "level", "group",
)  # fmt: skip
"""Labels of form fields and text entries; printed large enough for the coarse view."""
FILLER: tuple[str, ...] = (
    "the", "old", "river", "moves", "under", "a", "wide", "bridge", "and", "all", "birds", "wait", "until",
    "morning", "light", "falls", "on", "every", "stone", "near", "our", "quiet", "garden", "wall",
)  # fmt: skip
CODE_LENGTH = 3
PITCH = 1.3
"""Height of a code's box, and the distance of its digits on plain pages, in widths of a digit."""
GLYPH_ASPECT = 0.57
"""Width of a digit of PIL's default font divided by the font size."""

SPLITS = ("train", "validation", "test", "shifted")


@dataclass(frozen=True)
class PageSettings:
    """How pages are drawn; the default is the distribution that the published figures are measured on.

    Args:
        side: Range of the longer page side in pixels.
        aspect: Range of the shorter side divided by the longer one.
        items: Range of the number of entries.
        digit_width: Range of a digit's width, as a share.
        large_share: Share of scenes in which one code is printed so large that the coarse view shows it.
        variety: "plain": one font, black on white, as drawn; "varied": fonts, colours, rotation, noise and JPEG
            artefacts, and more kinds of pages. Each gives the same page for the same seed for good.
        codes: "digits": three of them; "letters": codes such as K7-204, K72 and 20K. Only varied pages have letters.
        typefaces: Names of `fonts.TYPEFACES` that varied pages are printed in; by default those of the split.
    """

    side: tuple[int, int] = (1024, 1400)
    aspect: tuple[float, float] = (0.8, 1.0)
    items: tuple[int, int] = (2, 7)
    digit_width: tuple[float, float] = (1 / 66, 1 / 58)
    large_share: float = 0.5
    variety: str = "plain"
    codes: str = "digits"
    typefaces: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: A name that does not exist, or an option of varied pages on plain ones.
        """
        for name, known in (("variety", VARIETIES), ("codes", tuple(CODE_PATTERNS))):
            if getattr(self, name) not in known:
                raise ValueError(f"There is no {name} {getattr(self, name)!r}; there are {list(known)}.")
        if self.variety == "plain" and (self.codes != "digits" or self.typefaces is not None):
            raise ValueError("codes and typefaces are options of varied pages: set variety='varied' with them.")
        unknown = sorted(set(self.typefaces or ()) - set(TYPEFACES))
        if unknown or self.typefaces == ():
            raise ValueError(f"typefaces must name some of {list(TYPEFACES)}, got {list(self.typefaces or ())}.")


_SMALL_PRINT: dict[str, Any] = {"side": (1200, 1600), "digit_width": (1 / 130, 1 / 112)}
"""Print that `evaluation.witness` seldom reads at 64 tokens, chosen on validation pages; at 1/62 it reads most."""
PAGE_SETTINGS: dict[str, PageSettings] = {
    "plain": PageSettings(),
    "varied": PageSettings(**_SMALL_PRINT, variety="varied"),
    "letters": PageSettings(**_SMALL_PRINT, variety="varied", codes="letters"),
}
"""Settings by the names that commands take."""


def named_settings(name: str) -> PageSettings:
    """The settings of a name that commands take.

    Raises:
        ValueError: There are none of this name.
    """
    if name not in PAGE_SETTINGS:
        raise ValueError(f"There are no pages {name!r}; there are {list(PAGE_SETTINGS)}.")
    return PAGE_SETTINGS[name]


@dataclass(frozen=True)
class Entry:
    """One place of a page that carries a code.

    Args:
        name: How questions call it, such as "red circle" or "total".
        code: Three digits, or letters and digits.
        code_box: Where they stand.
        digit_boxes: One box per character of the code.
        digit_width: Width of a digit in pixels.
        mark: What the coarse view shows of it: the shape, or the label word.
        box: Mark and code together.
        line: The line that the code stands in, where the coarse view does not show the place inside it.
        color, shape, word: What the mark is; None where it is not of that sort.
        large: The code is legible in the coarse view.
    """

    name: str
    code: str
    code_box: Box
    digit_boxes: tuple[Box, ...]
    digit_width: float
    mark: Box
    box: Box
    line: Box
    color: str | None = None
    shape: str | None = None
    word: str | None = None
    large: bool = False


@dataclass(frozen=True)
class Page:
    """A drawn page and what is on it.

    Args:
        kind: "scene", "form" or "text"; varied ones also "table", "columns" or "sizes".
        image: RGB.
        entries: In reading order.
        bar: Box and colour of the bar at the top; None in scenes.
        absent: Names of the same sort that are not on the page.
    """

    kind: str
    image: Image.Image
    entries: tuple[Entry, ...]
    bar: tuple[Box, str] | None = None
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question about a page, with its answer and the place that holds it.

    Args:
        text: The question.
        answer: The exact expected answer.
        kind: "fine" (an illegible detail decides), "coarse" (it does not), "multi" (several details) or "absent".
        box: The place that holds the answer; the whole page for counting and for what is absent.
        items: Indices into `Page.entries` of what is asked about.
    """

    text: str
    answer: str
    kind: str
    box: Box
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Style:
    """Fonts and layouts of a split.

    Args:
        split: Which layouts may occur.
        fonts: Names that `load_font` takes; Pillow's own font if there are none.
    """

    split: str = "train"
    fonts: tuple[str | None, ...] = ()

    @property
    def shifted(self) -> bool:
        """Whether layouts are of the sort that training never shows."""
        return self.split == "shifted"


def to_box(edges: tuple[float, float, float, float]) -> Box:
    """The smallest box of whole pixels around a rectangle."""
    x0, y0, x1, y1 = edges
    return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


def union(*boxes: Box) -> Box:
    """The smallest box around several."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def layout_of_split(signature: object, split: str) -> bool:
    """Whether a page with this layout may occur in a split: of ten layouts eight train, one validates, one tests."""
    if split == "shifted":
        return True
    place = zlib.crc32(repr(signature).encode()) % 10
    return place == {"validation": 8, "test": 9}[split] if split != "train" else place < 8


@dataclass
class Canvas:
    """A page while it is drawn.

    Args:
        image: RGB paper.
        rng: Source of everything that varies.
        font: Name of the page's font, None for Pillow's own.
        look: Ink, codes and their spacing on varied pages; None on plain ones.
    """

    image: Image.Image
    rng: random.Random
    font: str | None
    look: Look | None = None
    draw: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image)

    @property
    def long(self) -> int:
        """The longer side in pixels."""
        return max(self.image.size)

    def ink(self) -> tuple[int, ...]:
        """A dark colour: nearly black, or near the page's own."""
        return (self.rng.randint(0, 50),) * 3 if self.look is None else self.look.near_ink(self.rng)

    @property
    def paper(self) -> tuple[int, int, int]:
        """The paper's colour; white on plain pages, where nothing asks for it."""
        return (255, 255, 255) if self.look is None else self.look.paper

    def tint(self, color: str) -> tuple[int, ...]:
        """A colour a little off its pure value."""
        return tuple(min(255, max(0, c + self.rng.randint(-14, 14))) for c in COLORS[color])

    def size_of(self, width: float) -> float:
        """Size in pixels of the page's font at which a digit is `width` pixels wide."""
        return width / GLYPH_ASPECT if self.look is None else self.look.font_size(width)

    def sized_font(self, size: float) -> ImageFont.FreeTypeFont:
        """The page's font at a size in pixels."""
        return load_font(self.font, max(4, round(size)))

    def fitting(self, words: list[str], letter: float, room: float) -> float:
        """The letter width at which no word takes more room in pixels: `letter`, or less."""
        font = self.sized_font(self.size_of(letter))
        return letter * min(1.0, room / max(font.getlength(word) for word in words))

    def word(self, text: str, left: float, middle: float, letter_width: float) -> Box:
        """Print a word at a mean letter width; returns its box."""
        font = self.sized_font(self.size_of(letter_width))
        self.draw.text((left, middle), text, font=font, fill=self.ink(), anchor="lm")
        return to_box(self.draw.textbbox((left, middle), text, font=font, anchor="lm"))

    def code_span(self, width: float) -> float:
        """Room in pixels that any code takes whose digits are `width` pixels wide."""
        return PITCH * width * (CODE_LENGTH if self.look is None else self.look.longest_code)

    def text_span(self, text: str | None, width: float) -> float:
        """Room in pixels that a code takes; None is a code that is not known yet."""
        if self.look is None or text is None:
            return self.code_span(width)
        return sum(self._advances(text, width))

    def _advances(self, text: str, width: float) -> list[float]:
        if self.look is None:
            return [PITCH * width] * len(text)
        font = self.sized_font(self.size_of(width))
        return [font.getlength(character) + self.look.spacing * width for character in text]

    def new_code(self, short: bool = False) -> str | None:
        """A code that is known before it is printed; on plain pages None, `code` draws it.

        Args:
            short: Whether it is to have three characters.
        """
        return None if self.look is None else self.look.random_code(self.rng, short)

    def code(
        self, left: float, middle: float, width: float, fill: tuple[int, ...], text: str | None = None
    ) -> tuple[str, list[Box], Box]:
        """Print a code with digits `width` pixels wide; returns it, the characters' boxes and the box of all.

        Args:
            text: What `new_code` gave; a random code by default.
        """
        height = PITCH * width
        if text is None:
            text = self.new_code() or "".join(str(self.rng.randrange(10)) for _ in range(CODE_LENGTH))
        font = self.sized_font(self.size_of(width))
        ink_box = font.getbbox("0", anchor="mm")
        # the anchor is the middle of the line, which is not the middle of a digit
        baseline = middle - (ink_box[1] + ink_box[3]) / 2
        boxes, x = [], left
        for character, advance in zip(text, self._advances(text, width), strict=True):
            self.draw.text((x + advance / 2, baseline), character, font=font, fill=fill, anchor="mm")
            boxes.append(to_box((x, middle - height / 2, x + advance, middle + height / 2)))
            x += advance
        return text, boxes, to_box((left, middle - height / 2, x, middle + height / 2))


def blank_page(rng: random.Random, settings: PageSettings, style: Style) -> Canvas:
    """Paper with a few faint lines."""
    long = rng.randint(*settings.side)
    short = round(long * rng.uniform(*settings.aspect))
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    paper = rng.randint(228, 255)
    color = tuple(min(255, paper + rng.randint(-6, 6)) for _ in range(3))
    font, look = rng.choice(style.fonts) if style.fonts else None, None
    if settings.variety != "plain":
        look = Look.of(rng, font, settings.codes)
        color, paper = look.paper, min(look.paper)
    canvas = Canvas(Image.new("RGB", (width, height), color), rng, font, look)
    for _ in range(rng.randint(0, 4)):
        ends = [rng.randrange(width), rng.randrange(height), rng.randrange(width), rng.randrange(height)]
        canvas.draw.line(ends, fill=(paper - 30,) * 3, width=max(1, long // 400))
    return canvas
