"""Measures on cases worked out by hand."""

import pytest

from modeling_qzoom.evaluation.metrics import area_share, auroc, covered_share, exact_match, region_recall


def test_exact_match_ignores_case_and_margins_only() -> None:
    assert exact_match(" Red\n", "red")
    assert not exact_match("472", "47")
    assert not exact_match("", "4")


@pytest.mark.parametrize(
    ("scores", "labels", "area"),
    [
        ([0.1, 0.2, 0.8, 0.9], [False, False, True, True], 1.0),
        ([0.9, 0.8, 0.2, 0.1], [False, False, True, True], 0.0),
        ([0.5, 0.5, 0.5, 0.5], [False, True, False, True], 0.5),
        ([0.1, 0.4, 0.35, 0.8], [False, False, True, True], 0.75),
    ],
)
def test_auroc(scores: list[float], labels: list[bool], area: float) -> None:
    assert auroc(scores, labels) == pytest.approx(area)


def test_auroc_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="positive and one negative"):
        auroc([0.1, 0.2], [True, True])


def test_covered_share() -> None:
    assert covered_share((0, 0, 10, 10), (2, 2, 4, 4)) == 1.0
    assert covered_share((0, 0, 3, 10), (2, 2, 4, 4)) == 0.5
    assert covered_share((5, 5, 10, 10), (2, 2, 4, 4)) == 0.0
    assert covered_share(None, (2, 2, 4, 4)) == 0.0


def test_region_recall_counts_targets_covered_enough() -> None:
    target = (0, 0, 10, 10)
    assert region_recall([(0, 0, 10, 10), (0, 0, 10, 9), (0, 0, 10, 8), None], [target] * 4) == 0.5
    with pytest.raises(ValueError, match="at least one target"):
        region_recall([], [])


def test_area_share() -> None:
    assert area_share((0, 0, 50, 20), (100, 100)) == pytest.approx(0.1)
