"""Measures on cases worked out by hand."""

import numpy as np
import pytest

from modeling_qzoom.asking.metrics import (
    anls,
    area_share,
    auroc,
    covered_share,
    edit_distance,
    exact_match,
    region_recall,
    relaxed_match,
)
from modeling_qzoom.evaluation.statistics import bootstrap_auroc, bootstrap_difference, bootstrap_mean


def test_exact_match_ignores_case_and_margins_only() -> None:
    assert exact_match(" Red\n", "red")
    assert not exact_match("472", "47")
    assert not exact_match("", "4")
    assert exact_match("b", ["a", "B"]) and not exact_match("c", ("a", "b"))
    with pytest.raises(ValueError, match="at least one truth"):
        exact_match("a", [])


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_anls_keeps_slips_and_drops_wrong_answers() -> None:
    assert anls("Hello  World", "hello world") == 1.0
    assert anls("hella world", "hello world") == pytest.approx(10 / 11)
    assert anls("ab", "abcd") == 0.0  # half wrong is the threshold, which has to be exceeded
    assert anls("ab", "abcd", threshold=0.4) == 0.5
    assert anls("abcx", ["zzzz", "abcd"]) == 0.75
    assert anls("", "a") == 0.0


def test_relaxed_match_forgives_numbers_only() -> None:
    assert relaxed_match("105", "100") and not relaxed_match("106", "100")
    assert relaxed_match("-9.6", "-10") and not relaxed_match("10", "-10")
    assert relaxed_match("12%", "0.12") and relaxed_match("12.5%", "12%")
    assert relaxed_match("0", "0") and not relaxed_match("0.01", "0")
    assert relaxed_match("Blue", "blue") and not relaxed_match("blues", "blue")
    assert relaxed_match("3", ["two", "3.1"])
    assert not relaxed_match("", "5")


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


def test_auroc_equals_counting_pairs() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(0, 20, 80) / 20, rng.random(80) < 0.4
    left, right = scores[labels][:, None], scores[~labels][None]
    assert auroc(list(scores), list(labels)) == pytest.approx(((left > right) + 0.5 * (left == right)).mean())


def test_auroc_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="positive and one negative"):
        auroc([0.1, 0.2], [True, True])
    with pytest.raises(ValueError, match="positive and one negative"):
        bootstrap_auroc([0.1, 0.2], [False, False])


def test_the_interval_of_a_mean_has_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = bootstrap_mean(list(values))
    deviation = np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert low == pytest.approx(values.mean() - 1.96 * deviation, abs=0.01)
    assert high == pytest.approx(values.mean() + 1.96 * deviation, abs=0.01)
    assert bootstrap_mean(list(values)) == (low, high) != bootstrap_mean(list(values), seed=1)
    narrow = bootstrap_mean(list(values), confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_mean([1, 1, 1]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([])


def test_many_rows_are_resampled_in_parts(monkeypatch) -> None:
    values = list(np.random.default_rng(0).random(50))
    whole = bootstrap_mean(values)
    monkeypatch.setattr("modeling_qzoom.evaluation.statistics._CHUNK", 120)
    assert bootstrap_mean(values) == pytest.approx(whole)


def test_a_paired_difference_is_narrower_than_two_means() -> None:
    rng = np.random.default_rng(1)
    first = rng.random(300)
    second = first - 0.02 + 0.01 * rng.random(300)
    low, high = bootstrap_difference(list(first), list(second))
    assert 0.01 < low < high < 0.02
    with pytest.raises(ValueError, match="as many values"):
        bootstrap_difference([1.0], [1.0, 2.0])


def test_the_interval_of_an_auroc_holds_it() -> None:
    rng = np.random.default_rng(2)
    labels = [True] * 100 + [False] * 150
    scores = list(np.concatenate([rng.normal(1, 1, 100), rng.normal(0, 1, 150)]))
    low, high = bootstrap_auroc(scores, labels)
    assert 0.5 < low < auroc(scores, labels) < high < 1 and high - low < 0.2
    assert bootstrap_auroc(scores, labels) == (low, high)
    assert bootstrap_auroc([0, 0, 1, 1], [False, False, True, True]) == (1.0, 1.0)


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
