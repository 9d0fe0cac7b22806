"""Rows: an image, a question and, where known, answers and the box that holds them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..processing_images_qzoom import ImageSlot, load_rgb


Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Row:
    """One question about one image.

    Args:
        id: Unique in its data.
        image: A path, a PIL image, encoded bytes, or a function that returns an image.
        question: The question as the user asks it.
        answers: Accepted answers; empty where the data has none.
        image_id: The same for rows about the same image.
        box: Where the answer is, (x0, y0, x1, y1) in source pixels; only drawn pages know.
        kind: Kind of a drawn question.
    """

    id: str
    image: Any = field(repr=False)
    question: str
    answers: tuple[str, ...] = ()
    image_id: str = ""
    box: Box | None = None
    kind: str | None = None

    def load_image(self, max_pixels: int | None = None) -> Image.Image:
        """The image as RGB.

        Raises:
            ValueError: It cannot be read or is too large; names the row.
        """
        image = self.image() if callable(self.image) else self.image
        try:
            return load_rgb(ImageSlot(image, 0), max_pixels)
        except ValueError as error:
            raise ValueError(f"row {self.id}: {error}") from error


class Rows(Sequence[Row]):
    """Rows in a fixed order.

    Args:
        rows: The rows.
        fingerprint: Names data, order and limit, so that labels of other rows are not mixed with these.
    """

    def __init__(self, rows: Sequence[Row], fingerprint: str) -> None:
        self._rows, self.fingerprint = rows, fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


def by_image(rows: Iterable[Any], key: Callable[[Any], str]) -> list[list[Any]]:
    """Groups of items about one image, in order of first appearance."""
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
