"""Records of `label-routes`: what each configuration of VISOR answers to a row."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class RouteRecord:
    """One row of `label-routes`. Lists have an entry per configuration, in the same order in every row.

    Attributes:
        id: id of the row.
        question: question of the row.
        answers: accepted answers of the row.
        configurations: names of the configurations.
        letters: what each of them does, one letter a layer.
        replies: the model's reply under each.
        right: whether each reply is right.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    configurations: list[str]
    letters: list[str]
    replies: list[str]
    right: list[bool]

    def to_row(self) -> dict[str, Any]:
        """The record by the columns of its file."""
        return {**vars(self), "answers": list(self.answers)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "RouteRecord":
        """The record of a row of its file."""
        return cls(**{field.name: row[field.name] for field in fields(cls)} | {"answers": tuple(row["answers"])})
