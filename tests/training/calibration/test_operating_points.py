"""Operating points without decoding, presets among them, and which regions are tried."""

import numpy as np
import pytest

from modeling_qzoom.training.calibration.candidates import Candidate, agreements, rank_candidates
from modeling_qzoom.training.calibration.operating_points import (
    Outcomes,
    Point,
    choose_presets,
    gate_thresholds,
    gated_points,
)


def outcomes(rng, rows: int, zoomed: bool) -> Outcomes:
    tokens = rng.integers(10, 20, rows)
    return Outcomes(rng.random(rows) < 0.5, np.full(rows, zoomed), tokens, tokens * 7.0)


def test_points_equal_a_count_row_by_row():
    rng = np.random.default_rng(0)
    closed, opened = outcomes(rng, 30, False), outcomes(rng, 30, True)
    probabilities = rng.integers(0, 12, 30) / 11  # with ties, 0 and 1
    points = gated_points(closed, opened, probabilities, {"crop_max_tokens": 8}, plain_flops=1000.0)
    assert len(points) == len(set(probabilities.tolist())) + 1
    for point in points:
        threshold = point.options["gate_threshold"]
        opens = probabilities >= threshold
        right = np.where(opens, opened.right, closed.right)
        assert point.options["crop_max_tokens"] == 8
        assert point.accuracy == pytest.approx(right.mean())
        assert point.zoomed_share == pytest.approx(opens.mean())
        assert point.visual_tokens == pytest.approx(np.where(opens, opened.tokens, closed.tokens).mean())
        assert point.relative_flops == pytest.approx(np.where(opens, opened.flops, closed.flops).sum() / 1000)


def test_gate_thresholds_lie_between_rows():
    assert gate_thresholds(np.array([0.2, 0.6, 0.2])).tolist() == pytest.approx([0.0, 0.4, 0.8])
    assert gate_thresholds(np.array([1.0])).tolist() == [0.0, 1.01]


def point(accuracy: float, cost: float) -> Point:
    return Point({"gate_threshold": cost}, accuracy, 0.5, 50.0, cost)


POINTS = [point(0.5, 1.1), point(0.88, 1.3), point(0.895, 1.5), point(0.9, 2.0), point(0.9, 2.5), point(0.7, 3.0)]


@pytest.mark.parametrize(
    ("lose", "cost", "chosen"),
    [
        (0.02, None, (1.3, 1.5, 2.0)),
        (0.0, None, (2.0, 2.0, 2.0)),
        (0.5, None, (1.1, 1.3, 2.0)),
        (0.02, 1.4, (1.3, 1.5, 2.0)),
        (0.001, 1.5, (1.5, 2.0, 2.0)),  # nothing within the cost loses so little: the best of it
    ],
)
def test_presets(lose, cost, chosen):
    presets = choose_presets(POINTS, lose, cost)
    assert tuple(presets[name].relative_flops for name in ("fast", "balanced", "accurate")) == chosen


def test_a_cost_that_cannot_be_met():
    with pytest.raises(ValueError, match=r"cost_at_most=1.05 cannot be met: the cheapest point costs 1.100 ×.*0.500"):
        choose_presets(POINTS, 0.1, 1.05)


def test_regions_by_recall_then_area():
    """Two thresholds cover all targets, the smaller boxes win; a third misses one."""
    candidates = [Candidate("peak", value) for value in (0.1, 0.2, 0.3)]
    boxes = [[(0, 0, 90, 90), (0, 0, 50, 50), (0, 0, 20, 20)], [(0, 0, 80, 80), (0, 0, 40, 40), None], [None] * 3]
    sizes, targets = [(100, 100)] * 3, [(10, 10, 20, 20), (5, 5, 30, 30), None]
    ranked = rank_candidates(candidates, boxes, sizes, targets)
    assert [entry.candidate.threshold for entry in ranked] == [0.2]
    assert ranked[0].merit == 1 and ranked[0].area == pytest.approx((0.25 + 0.16) / 2)


def test_boxes_that_are_too_large_are_not_tried():
    candidates = [Candidate("peak", value) for value in (0.1, 0.2)]
    boxes, sizes, targets = [[(0, 0, 90, 90), (0, 0, 50, 50)]] * 2, [(100, 100)] * 2, [(10, 10, 80, 80)] * 2
    assert rank_candidates(candidates, boxes, sizes, targets)[0].candidate.threshold == 0.1
    assert [entry.candidate.threshold for entry in rank_candidates(candidates, boxes, sizes, targets, 0.3)] == [0.2]
    with pytest.raises(ValueError, match="the smallest cover 0.250"):
        rank_candidates(candidates, boxes, sizes, targets, 0.2)


def test_regions_by_agreement():
    candidates = [Candidate("peak", value) for value in (0.1, 0.2, 0.3, 0.4)]
    boxes = [[(0, 0, 100, 100), (0, 0, 50, 50), (0, 0, 51, 50), None]] * 2
    scores = agreements(boxes)
    # shares of the common area: 0.25 and 0.255 of the whole image, 50 / 51 of each other
    assert scores.tolist() == pytest.approx([(0.25 + 0.255) / 3, (0.25 + 50 / 51) / 3, (0.255 + 50 / 51) / 3, 0.0])
    ranked = rank_candidates(candidates, boxes, [(100, 100)] * 2, [None] * 2)
    # 0.2 makes boxes of the same size as 0.3
    assert [entry.candidate.threshold for entry in ranked] == [0.3, 0.1, 0.4]
