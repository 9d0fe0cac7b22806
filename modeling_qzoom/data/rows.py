"""Rows: an image, a question and, where known, answers and the box that holds them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, overload

from PIL import Image

from ..processing_images_qzoom import ImageSlot, load_rgb
from ..zoom_regions_qzoom import Box


# an image as a row knows it; encoded bytes are a file's content
ImageSource = str | bytes | Image.Image | Callable[[], Image.Image]
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One question about one image.

    Args:
        id: name of the row, unique in its data.
        image: a path, a PIL image, encoded bytes, or a function that returns an image.
        question: the question as the user asks it.
        answers: accepted answers; empty where the data has none.
        image_id: name of the image, the same for rows about the same image.
        box: where the answer is, (x0, y0, x1, y1) in source pixels; only drawn pages know.
        kind: kind of a drawn question.
    """

    id: str
    image: ImageSource = field(repr=False)
    question: str
    answers: tuple[str, ...] = ()
    image_id: str = ""
    box: Box | None = None
    kind: str | None = None

    def load_image(self, max_pixels: int | None = None) -> Image.Image:
        """The image as RGB.

        Raises:
            ValueError: it cannot be read or is too large; names the row.
        """
        image = self.image() if callable(self.image) else self.image
        try:
            return load_rgb(ImageSlot(image, 0), max_pixels)
        except ValueError as error:
            raise ValueError(f"row {self.id}: {error}") from error


class Rows(Sequence[Row]):
    """Rows in a fixed order.

    Args:
        rows: the rows.
        fingerprint: names data, order and limit, so that labels of other rows are not mixed with these.
    """

    def __init__(self, rows: Sequence[Row], fingerprint: str) -> None:
        self._rows, self.fingerprint = rows, fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self._rows[index]


def by_image(rows: Iterable[T], key: Callable[[T], str]) -> list[list[T]]:
    """Groups of items about one image, in order of first appearance."""
    groups: dict[str, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
