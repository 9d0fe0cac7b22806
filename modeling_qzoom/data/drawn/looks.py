"""What varies from one varied page to the next before anything is printed: paper, ink, spacing and codes."""

import colorsys
import random
from dataclasses import dataclass

from .fonts import digit_shape


VARIETIES = ("plain", "varied")
CODE_PATTERNS: dict[str, tuple[str, ...]] = {"digits": ("###",), "letters": ("A#-###", "A##", "##A", "###")}
"""Forms of a code: # is a digit, A a letter."""
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
"""Capitals without those that look like digits or like each other: I, O and Q."""
SHORT = 3
DIGIT_HEIGHT = 1.27
"""Largest ink height of a digit, in widths: narrow fonts are printed smaller, so that they stay in a code's box."""


@dataclass(frozen=True)
class Look:
    """The look of a varied page.

    Args:
        paper, ink: Colours.
        spacing: What is added to the distance of a code's characters, in widths of a digit.
        patterns: Forms of its codes.
        aspect, height: Width and ink height of a digit of its font, as shares of the font's size.
    """

    paper: tuple[int, int, int]
    ink: tuple[int, int, int]
    spacing: float
    patterns: tuple[str, ...]
    aspect: float
    height: float

    @classmethod
    def of(cls, rng: random.Random, font: str | None, codes: str) -> "Look":
        """A random look: light paper of any tint, dark ink of any hue.

        Args:
            font: The page's font.
            codes: Name of the codes' patterns.
        """
        paper = _color(rng.random(), rng.uniform(0, 0.14), rng.uniform(0.88, 1.0))
        ink = _color(rng.random(), rng.uniform(0, 1), rng.uniform(0.0, 0.38))
        return cls(paper, ink, rng.uniform(0.02, 0.25), CODE_PATTERNS[codes], *digit_shape(font))

    @property
    def longest_code(self) -> int:
        """Characters of the longest code."""
        return max(map(len, self.patterns))

    def near_ink(self, rng: random.Random) -> tuple[int, ...]:
        """The ink, a little lighter or darker."""
        step = rng.randint(-12, 12)
        return tuple(max(0, channel + step) for channel in self.ink)

    def font_size(self, width: float) -> float:
        """Size in pixels at which a digit is `width` pixels wide, smaller where it would be too tall."""
        return min(width / self.aspect, DIGIT_HEIGHT * width / self.height)

    def random_code(self, rng: random.Random, short: bool = False) -> str:
        """A code of one of the page's patterns.

        Args:
            short: Whether it is to have three characters.
        """
        pattern = rng.choice([pattern for pattern in self.patterns if not short or len(pattern) == SHORT])
        drawn = {"#": lambda: str(rng.randrange(10)), "A": lambda: rng.choice(LETTERS)}
        return "".join(drawn[mark]() if mark in drawn else mark for mark in pattern)


def _color(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
