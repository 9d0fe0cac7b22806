"""Records of `label-gates`: the model's replies to a row on a ladder of resolutions."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class GateRecord:
    """One row of `label-gates`. Lists have an entry per rung, from the lowest to the highest.

    Attributes:
        id: id of the row.
        image_id: the same for rows about the same image.
        question: question of the row.
        answers: accepted answers of the row.
        ladder: budgets of the rungs in merged visual tokens.
        replies: the model's reply at each rung.
        right: whether each reply is the annotated answer; None for a row without annotation.
        agrees: whether each reply agrees with the highest rung's.
    """

    id: str
    image_id: str
    question: str
    answers: tuple[str, ...]
    ladder: list[int]
    replies: list[str]
    right: list[bool] | None
    agrees: list[bool]

    def to_row(self) -> dict[str, Any]:
        """The record by the columns of its file."""
        return {**vars(self), "answers": list(self.answers)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "GateRecord":
        """The record of a row of its file."""
        return cls(**{field.name: row[field.name] for field in fields(cls)} | {"answers": tuple(row["answers"])})


@dataclass(frozen=True)
class GateRow:
    """A row that the gate learns from.

    Attributes:
        record: its label.
        wrong: number of rungs from the bottom that are wrong; the rest is right.
    """

    record: GateRecord
    wrong: int
