"""Operating points of a calibrated model and the choice of presets among them; nothing here runs the model.

A row's answer is the zoomed one where its gate reaches the threshold, else the plain one. So one plain and one zoomed
pass over the rows give accuracy and cost at every gate threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


BALANCED_SHARE = 0.25
"""The share of `lose_at_most` that "balanced" may lose: close to the best, where "fast" spends all of it."""
_TOLERANCE = 1e-9  # accuracies are quotients of whole numbers


@dataclass(frozen=True)
class Outcomes:
    """What rows gave one way. All arrays are (n,).

    Args:
        right: Whether the answer was right.
        zoomed: Whether a crop was used.
        tokens: Visual tokens, the crop's included.
        flops: FLOPs of the prefill.
    """

    right: np.ndarray
    zoomed: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray


@dataclass(frozen=True)
class Point:
    """A way to run the model, and what it gave on the rows.

    Args:
        options: Of `generate`.
        accuracy: Share of right answers.
        zoomed_share: Share of rows that used a crop.
        visual_tokens: Mean per row.
        relative_flops: Mean prefill FLOPs as a multiple of the plain model's at the coarse budget.
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
        probabilities: (n,).
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
        closed: Outcomes of rows whose gate stays closed.
        opened: Of rows whose gate opens.
        probabilities: (n,) of the gate.
        options: That `opened` was made with.
        plain_flops: Sum over the rows of what the plain model costs.
    """
    order = np.argsort(probabilities, kind="stable")
    thresholds = gate_thresholds(probabilities)
    below = np.searchsorted(probabilities[order], thresholds)  # rows that stay closed at each threshold
    sums = []
    for name in ("right", "zoomed", "tokens", "flops"):
        shut, open_ = (np.asarray(getattr(side, name), dtype=float)[order] for side in (closed, opened))
        first, rest = (np.concatenate([[0.0], np.cumsum(values)]) for values in (shut, open_))
        sums.append(first[below] + rest[-1] - rest[below])
    return [
        _point({"gate_threshold": float(threshold), **options}, counts, len(order), plain_flops)
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
        lose_at_most: Accuracy, as a share of rows.
        cost_at_most: Mean prefill FLOPs as a multiple of the plain model's.

    Raises:
        ValueError: Every point costs more than `cost_at_most`; names the cheapest.
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
