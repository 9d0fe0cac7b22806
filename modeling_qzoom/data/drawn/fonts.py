"""Fonts of drawn pages: Pillow's own, those that matplotlib brings, and those of the extra `pages`.

No font is part of this repository. Where each typeface comes from, and under which licence its files are:

| typeface | package | licence | pages of |
|---|---|---|---|
| Roboto | font-roboto | Apache-2.0 | training |
| Lato | font-lato | OFL-1.1 | training |
| Caladea | font-caladea | Apache-2.0 | training |
| Source Sans Pro | font-source-sans-pro | OFL-1.1 | training |
| Source Serif Pro | font-source-serif-pro | OFL-1.1 | training |
| Manrope | font-manrope | OFL-1.1 | training |
| Hanken Grotesk | font-hanken-grotesk | OFL-1.1 | training |
| Red Hat Display | font-rhd | OFL-1.1 | training |
| Fjalla One (condensed) | font-fjallaone | OFL-1.1 | training |
| DejaVu Sans | matplotlib | Bitstream Vera | training |
| DejaVu Serif | matplotlib | Bitstream Vera | training |
| Aileron | Pillow | CC0-1.0 | training |
| STIX General (book face) | matplotlib | OFL-1.1 | `shifted` only |
| DejaVu Sans Mono (typewriter) | matplotlib | Bitstream Vera | `shifted` only |
| Fredoka One (rounded) | font-fredoka-one | OFL-1.1 | `shifted` only |
| Intuitive (handwriting) | font-intuitive | OFL-1.1 | `shifted` only |

The table is that of varied pages. Plain ones are printed in Aileron, and in three of DejaVu's faces where they are
`shifted`.
"""

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from PIL import ImageFont

from ..extras import needed_for


MATPLOTLIB = "matplotlib"
PILLOW = "PIL"
_REFERENCE = 200
"""Size in pixels at which the proportions of a font are measured."""


@dataclass(frozen=True)
class Typeface:
    """A typeface and the files of it that pages are printed in.

    Args:
        package: Module that holds the files; Pillow's own font has none.
        files: Their names.
        held_out: Whether only pages of the split `shifted` show it.
    """

    package: str
    files: tuple[str, ...]
    held_out: bool = False

    @property
    def fonts(self) -> tuple[str | None, ...]:
        """Names that `load_font` takes."""
        return tuple(f"{self.package}/{file}" for file in self.files) or (None,)


def _faces(package: str, stem: str, *weights: str, ending: str = "ttf") -> Typeface:
    return Typeface(package, tuple(f"{stem}-{weight}.{ending}" for weight in weights))


TYPEFACES: dict[str, Typeface] = {
    "Roboto": _faces("font_roboto", "Roboto", "Regular", "Medium", "Italic", "Bold"),
    "Lato": _faces("font_lato", "Lato", "Regular", "Italic", "Bold"),
    "Caladea": _faces("font_caladea", "Caladea", "Regular", "Italic", "Bold"),
    "Source Sans Pro": _faces("font_source_sans_pro", "SourceSansPro", "Regular", "Semibold", "It"),
    "Source Serif Pro": _faces("font_source_serif_pro", "SourceSerifPro", "Regular", "Semibold", "It"),
    "Manrope": _faces("font_manrope", "Manrope", "Regular", "SemiBold"),
    "Hanken Grotesk": _faces("font_hanken_grotesk", "HankenGrotesk", "Regular", "Medium", "Bold", ending="otf"),
    "Red Hat Display": _faces("font_rhd", "RedHatDisplay", "Regular", "Medium", "Bold"),
    "Fjalla One": _faces("font_fjallaone", "FjallaOne", "Regular"),
    "DejaVu Sans": Typeface(MATPLOTLIB, ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf")),
    "DejaVu Serif": Typeface(MATPLOTLIB, ("DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf")),
    "Aileron": Typeface(PILLOW, ()),
    "STIX General": Typeface(MATPLOTLIB, ("STIXGeneral.ttf", "STIXGeneralBol.ttf"), held_out=True),
    "DejaVu Sans Mono": Typeface(MATPLOTLIB, ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"), held_out=True),
    "Fredoka One": Typeface("font_fredoka_one", ("FredokaOne-Regular.ttf",), held_out=True),
    "Intuitive": Typeface("font_intuitive", ("Intuitive.ttf",), held_out=True),
}


def typefaces_of(split: str) -> tuple[str, ...]:
    """Names of the typefaces that varied pages of a split are printed in."""
    return tuple(name for name, face in TYPEFACES.items() if face.held_out == (split == "shifted"))


def _font_file(name: str) -> Path:
    """Where a font lies.

    Raises:
        ImportError: The package that brings it is missing; names the extra.
    """
    package, _, file = name.rpartition("/")
    if package in ("", MATPLOTLIB):
        with needed_for(f"The font {file} comes with matplotlib"):
            from matplotlib import get_data_path
        return Path(get_data_path()) / "fonts" / "ttf" / (file if package else f"{file}.ttf")
    distribution = package.replace("_", "-")
    with needed_for(f"Varied pages are printed in fonts of packages, and {distribution} is missing", "pages"):
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(package)
    return Path(spec.submodule_search_locations[0]) / "files" / file


@functools.lru_cache(maxsize=2048)
def load_font(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels.

    Args:
        name: `PACKAGE/FILE` of `TYPEFACES`, the bare name of a font that matplotlib brings, or None for Pillow's own.

    Raises:
        ImportError: The package that brings it is missing; names the extra.
    """
    if name is None:
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # what it is at a given size
    return ImageFont.truetype(str(_font_file(name)), size)


@functools.cache
def digit_shape(name: str | None) -> tuple[float, float]:
    """Advance width and ink height of a font's digits, as shares of its size."""
    font = load_font(name, _REFERENCE)
    left, top, right, bottom = font.getbbox("0", anchor="ls")
    return font.getlength("0") / _REFERENCE, (bottom - top) / _REFERENCE
