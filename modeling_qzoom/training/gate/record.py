"""Records of gate labels: answers on a ladder of resolutions."""

from dataclasses import dataclass
from typing import Any


Record = dict[str, Any]
Rung = tuple[int, int]
"""Index of a rung on the ladder, and the label of the view at this resolution: 1 where it is not enough."""


@dataclass(frozen=True)
class GateRow:
    """A row that the gate learns from.

    Args:
        record: As `label-gates` wrote it.
        wrong: How many rungs from the bottom are wrong; the rest is right.
    """

    record: Record
    wrong: int
