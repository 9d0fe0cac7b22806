"""Records of `mine-fusion`: what the plain and the zoomed model answer to a row, and who of them is right."""

from dataclasses import dataclass
from typing import Any

from ...zoom_regions_qzoom import Box


@dataclass(frozen=True)
class FusionRecord:
    """One row of `mine-fusion`; every row is recorded, so that counts can be trusted.

    Attributes:
        id: id of the row.
        question: question of the row.
        answers: accepted answers of the row.
        plain: answer of the plain model.
        zoomed: answer of the model with zoom="always".
        plain_right: whether the plain answer is right.
        zoomed_right: whether the zoomed answer is right.
        box: (x0, y0, x1, y1) in source pixels that the model zoomed into; None where it did not.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    plain: str
    zoomed: str
    plain_right: bool
    zoomed_right: bool
    box: Box | None

    @property
    def regression(self) -> bool:
        """Whether zooming made the answer worse."""
        return self.plain_right and not self.zoomed_right

    def to_row(self) -> dict[str, Any]:
        """The record by the columns of its file."""
        return {
            "id": self.id,
            "question": self.question,
            "answers": list(self.answers),
            "plain": self.plain,
            "zoomed": self.zoomed,
            "plain_right": self.plain_right,
            "zoomed_right": self.zoomed_right,
            "regression": self.regression,
            "box": None if self.box is None else list(self.box),
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "FusionRecord":
        """The record of a row of its file."""
        return cls(
            id=row["id"],
            question=row["question"],
            answers=tuple(row["answers"]),
            plain=row["plain"],
            zoomed=row["zoomed"],
            plain_right=row["plain_right"],
            zoomed_right=row["zoomed_right"],
            box=None if row["box"] is None else tuple(row["box"]),
        )
