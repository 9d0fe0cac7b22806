"""Gate labels: which rows say something, and at which resolution they are shown."""

import random
from collections import Counter

import pytest

from modeling_qzoom.data.rows import Row
from modeling_qzoom.training.gate.config import TrainGateConfig
from modeling_qzoom.training.gate.record import GateRecord, GateRow
from modeling_qzoom.training.gate.rule import (
    check_draws,
    coarse_rung,
    consistent_row,
    draw_rung,
    naive_row,
    select_rows,
)
from tests.training.stage_fixtures import gate_record


def record(right: str, agrees: str | None = None, annotated: bool = True, name: str = "") -> GateRecord:
    """Verdicts as + and -, from the lowest rung to the highest."""
    verdicts, agreement = ([sign == "+" for sign in text] for text in (right, agrees or right))
    row = Row(name or right, None, "?", ("x",))
    return gate_record(row, verdicts if annotated else None, list(range(len(right))), agreement)


EASY = record("++++")


@pytest.mark.parametrize(
    "given, outcome",
    [
        (record("++++"), 0),
        (record("-+++"), 1),
        (record("--++"), 2),
        (record("---+", "--++"), 3),
        (record("-+-+", "--++"), "right at a rung and wrong at a higher one"),
        (record("++++", "+++-"), "the two highest rungs disagree"),
        (record("++-+", "++-+"), "the two highest rungs disagree"),
        (record("----", "--++"), "the consensus is not the annotation"),
        (record("++--", "--++"), "the consensus is not the annotation"),
        (record("----", "-+++", annotated=False), 1),
        (record("----", "+-++", annotated=False), "right at a rung and wrong at a higher one"),
    ],
)
def test_consistent_rows(given, outcome) -> None:
    found = consistent_row(given)
    assert (found.wrong if isinstance(found, GateRow) else found) == outcome


def test_naive_rows_look_at_the_coarse_rung_only() -> None:
    assert naive_row(record("+-+-"), 0).wrong == 0
    assert naive_row(record("+-+-"), 1).wrong > 0
    assert naive_row(record("+", annotated=False), 0) == "there is no annotation"


@pytest.mark.parametrize("budget, rung", [(None, 0), (64, 0), (90, 0), (91, 1), (300, 2), (4096, 3)])
def test_the_coarse_rung_is_the_nearest(budget, rung) -> None:
    assert coarse_rung([64, 128, 256, 512], budget) == rung


def test_easy_rows_are_no_more_than_asked_for(caplog) -> None:
    records = [record("++++")] * 10 + [record("--++")] * 4 + [record("-+-+", "--++")] * 3
    with caplog.at_level("INFO"):
        chosen = select_rows(records, TrainGateConfig(easy_share=0.5))
    assert Counter(row.wrong for row in chosen) == {0: 2, 2: 4}
    assert "3 of 17 rows dropped: right at a rung" in caplog.text
    assert "10 rows need no zoom, 4 do at some rung" in caplog.text


def test_easy_rows_are_drawn_with_the_seed() -> None:
    records = [record("++++", name=str(number)) for number in range(30)] + [record("--++")] * 5

    def easy(seed: int) -> list[str]:
        return [row.record.id for row in select_rows(records, TrainGateConfig(seed=seed)) if not row.wrong]

    assert easy(0) == easy(0) != easy(1)
    assert len(easy(0)) == 5


def test_one_kind_of_rows_is_not_enough() -> None:
    with pytest.raises(ValueError, match="one kind is missing"):
        select_rows([record("++++")] * 3, TrainGateConfig())


def test_naive_labeling_filters_nothing() -> None:
    records = [record("+---")] * 5 + [record("-+-+")]
    chosen = select_rows(records, TrainGateConfig(labeling="naive"))
    assert Counter(bool(row.wrong) for row in chosen) == {False: 5, True: 1}
    with pytest.raises(ValueError, match="labeling must be one of"):
        select_rows(records, TrainGateConfig(labeling="both"))


def drawn(row: GateRow, config: TrainGateConfig, count: int = 4000, **options) -> Counter:
    rng = random.Random(0)
    return Counter(draw_rung(row, 6, config, rng, **options) for _ in range(count))


def test_easy_rows_are_shown_below_the_top() -> None:
    found = drawn(GateRow(EASY, 0), TrainGateConfig())
    assert set(found) == {(0, 0), (1, 0), (2, 0), (3, 0)}
    assert min(found.values()) > 900


def test_transitions_are_shown_mostly_where_they_just_fail() -> None:
    found = drawn(GateRow(EASY, 3), TrainGateConfig(draw_high=0.75))
    assert set(found) == {(1, 1), (2, 1), (3, 0)}
    assert 850 < found[3, 0] < 1150 and abs(found[1, 1] - found[2, 1]) < 250


def test_a_transition_without_a_right_rung_to_show_is_shown_wrong() -> None:
    assert set(drawn(GateRow(EASY, 4), TrainGateConfig(draw_high=0.0))) == {(2, 1), (3, 1)}
    assert set(drawn(GateRow(EASY, 1), TrainGateConfig(draw_high=1.0))) == {(0, 1)}


def test_naive_rows_are_shown_at_the_coarse_rung() -> None:
    config = TrainGateConfig(labeling="naive")
    assert set(drawn(GateRow(EASY, 0), config, 10, coarse=1)) == {(1, 0)}
    assert set(drawn(GateRow(EASY, 2), config, 10, coarse=1)) == {(1, 1)}


@pytest.mark.parametrize(
    "fields, message", [({"skip_top": 4}, "skip_top"), ({"draw_high": 1.5}, "draw_high"), ({"easy_share": 0}, "easy")]
)
def test_impossible_draws_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_draws(4, TrainGateConfig(**fields))
