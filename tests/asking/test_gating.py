"""Gate thresholds without decoding: sums over rows equal what each row gives."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from modeling_qzoom.asking.gating import auto_sums, derive_auto


@dataclass(frozen=True)
class Report:
    gate_probability: float | None
    reason: str = "forced"


@dataclass(frozen=True)
class Answer:
    tokens: float
    report: Report = field(default=Report(None))


def test_sums_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.integers(0, 6, 40) / 5  # with ties, 0 and 1
    never, always = rng.random(40), rng.random(40)
    thresholds = np.array([0.0, 0.2, 0.3, 1.0, 1.01])
    sums = auto_sums(never, always, probabilities, thresholds)
    rows = [
        (Answer(plain), Answer(zoomed, Report(float(probability))))
        for plain, zoomed, probability in zip(never, always, probabilities, strict=True)
    ]
    expected = [sum(derive_auto(*row, threshold).tokens for row in rows) for threshold in thresholds.tolist()]
    assert sums.tolist() == pytest.approx(expected)


def test_a_closed_gate_is_named() -> None:
    never, always = Answer(1.0, Report(None, "never")), Answer(2.0, Report(0.3))
    closed = derive_auto(never, always, 0.5)
    assert (closed.tokens, closed.report) == (1.0, Report(0.3, "gate_closed"))
    assert derive_auto(never, always, 0.3) is always
    ungated = Answer(2.0, Report(None))
    assert derive_auto(never, ungated, 0.5) is ungated
