"""Operating points of a calibrated model and the choice of presets among them; nothing here runs the model.

One plain and one zoomed pass over the rows give accuracy and cost at every gate threshold (`asking.gating`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...asking.gating import auto_sums


# share of `lose_at_most` that "balanced" may lose: close to the best, where "fast" spends all of it
BALANCED_SHARE = 0.25
_TOLERANCE = 1e-9  # accuracies are quotients of whole numbers


@dataclass(frozen=True)
class Outcomes:
    """What rows gave one way. All arrays are (n,).

    Attributes:
        right: whether the answer was right.
        zoomed: whether a crop was used.
        tokens: visual tokens, the crop's included.
        flops: FLOPs of the prefill.
    """

    right: np.ndarray
    zoomed: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[bool, bool, int, float]]) -> "Outcomes":
        """The outcomes of (right, zoomed, tokens, flops) of each row."""
        right, zoomed, tokens, flops = zip(*rows, strict=True)
        return cls(np.array(right), np.array(zoomed), np.array(tokens), np.array(flops, dtype=float))


@dataclass(frozen=True)
class Point:
    """A way to run the model, and what it gave on the rows.

    Attributes:
        options: options of `generate`.
        accuracy: share of right answers.
        zoomed_share: share of rows that used a crop.
        visual_tokens: mean number of visual tokens per row.
        relative_flops: mean prefill FLOPs as a multiple of the plain model's at the coarse budget.
    """

    options: dict[str, Any] = field(hash=False)
    accuracy: float
    zoomed_share: float
    visual_tokens: float
    relative_flops: float


def gate_thresholds(probabilities: np.ndarray) -> np.ndarray:
    """Thresholds that tell rows apart, ascending: 0, midway between neighbouring probabilities, and above the largest.

    Midway, so that rounding on other hardware does not move a row to the other side.

    Args:
        probabilities: (n,) of the gate.
    """
    values = np.unique(probabilities)
    above = (values[-1] + 1) / 2 if values[-1] < 1 else 1.01
    return np.concatenate([[0.0], (values[:-1] + values[1:]) / 2, [above]])


def _point(options: dict[str, Any], counts: Sequence[float], rows: int, plain_flops: float) -> Point:
    right, zoomed, tokens, flops = (float(count) for count in counts)
    return Point(options, right / rows, zoomed / rows, tokens / rows, flops / plain_flops)


def gated_points(
    closed: Outcomes, opened: Outcomes, probabilities: np.ndarray, options: dict[str, Any], plain_flops: float
) -> list[Point]:
    """A point for every gate threshold.

    Args:
        closed: outcomes of the rows where their gates stay closed.
        opened: outcomes of the rows where their gates open.
        probabilities: (n,) of the gate.
        options: options that `opened` was made with.
        plain_flops: sum over the rows of what the plain model costs.
    """
    thresholds = gate_thresholds(probabilities)
    sums = [
        auto_sums(figure, getattr(opened, name), probabilities, thresholds) for name, figure in vars(closed).items()
    ]
    return [
        _point({"gate_threshold": float(threshold), **options}, counts, len(probabilities), plain_flops)
        for threshold, *counts in zip(thresholds, *sums)
    ]


def single_point(outcomes: Outcomes, options: dict[str, Any], plain_flops: float) -> Point:
    """The one point of a way to run the model that asks no gate."""
    counts = [np.sum(part, dtype=float) for part in vars(outcomes).values()]
    return _point(options, counts, len(outcomes.right), plain_flops)


def _cheapest(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: (point.relative_flops, -point.accuracy))


def choose_presets(points: Sequence[Point], lose_at_most: float, cost_at_most: float | None) -> dict[str, Point]:
    """The points behind the presets.

    - "accurate": the best accuracy, the cheapest of equals.
    - "balanced": the cheapest that loses at most a quarter of `lose_at_most` against the best.
    - "fast": the cheapest that loses at most `lose_at_most`. With `cost_at_most` it costs no more than that in any
      case; where no such point loses so little, it is the most accurate of them.

    Args:
        points: points to choose from.
        lose_at_most: accuracy that "fast" may lose, as a share of rows.
        cost_at_most: mean prefill FLOPs that "fast" may cost, as a multiple of the plain model's.

    Raises:
        ValueError: every point costs more than `cost_at_most`; names the cheapest.
    """
    best = max(point.accuracy for point in points)

    def within(loss: float, among: Sequence[Point] = points) -> list[Point]:
        return [point for point in among if point.accuracy >= best - loss - _TOLERANCE]

    affordable = [point for point in points if cost_at_most is None or point.relative_flops <= cost_at_most]
    if not affordable:
        cheapest = _cheapest(points)
        raise ValueError(
            f"cost_at_most={cost_at_most} cannot be met: the cheapest point costs {cheapest.relative_flops:.3f} × the "
            f"plain model's prefill, at an accuracy of {cheapest.accuracy:.3f}. Allow that much, or try smaller crops "
            "(crop_max_tokens)."
        )
    top = max(point.accuracy for point in affordable)
    fast = within(lose_at_most, affordable) or [point for point in affordable if point.accuracy >= top]
    return {
        "fast": _cheapest(fast),
        "balanced": _cheapest(within(lose_at_most * BALANCED_SHARE)),
        "accurate": _cheapest(within(0.0)),
    }
