"""Bootstrap intervals of the figures."""

from collections.abc import Callable, Sequence

import numpy as np

from ..asking.metrics import roc_area, tied_counts


Interval = tuple[float, float]

RESAMPLES = 1000
CONFIDENCE = 0.95
_CHUNK = 2_000_000  # random indices held in memory at a time


def _percentiles(draw: Callable[[int], np.ndarray], width: int, resamples: int, confidence: float) -> Interval:
    """Interval of a statistic: `draw(b)` gives it for b resamples of `width` numbers each."""
    samples: list[np.ndarray] = []
    left = resamples
    while left > 0:
        count = min(left, max(1, _CHUNK // width))
        samples.append(draw(count))
        left -= count
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(samples), [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Interval:
    """Percentile interval of a mean over rows. Values that are all equal give an interval without width.

    Args:
        values: (n,) one per row; True counts 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: no values.
    """
    numbers = np.asarray(values, dtype=float)
    if not len(numbers):
        raise ValueError("bootstrap_mean needs at least one value.")
    rng, count = np.random.default_rng(seed), len(numbers)
    return _percentiles(
        lambda b: numbers[rng.integers(0, count, (b, count))].mean(axis=1), count, resamples, confidence
    )


def bootstrap_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of mean(first) − mean(second) over the same rows: both are resampled together.

    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(first) != len(second):
        raise ValueError(
            f"A paired difference needs as many values on both sides, got {len(first)} and {len(second)}."
        )
    paired = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return bootstrap_mean(paired, seed=seed, resamples=resamples, confidence=confidence)


def bootstrap_auroc(
    scores: Sequence[float],
    labels: Sequence[bool],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of `auroc`; positives and negatives are resampled apart, so that no resample lacks either.

    Raises:
        ValueError: no positive or no negative label.
    """
    positives, negatives = tied_counts(scores, labels)
    rng = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        samples = [rng.multinomial(part.sum(), part / part.sum(), size=count) for part in (positives, negatives)]
        return roc_area(*samples)

    return _percentiles(draw, len(positives), resamples, confidence)
