"""Which configuration a row teaches the router."""

import pytest

from modeling_qzoom.training.vision.route_record import RouteRecord
from modeling_qzoom.training.vision.route_rule import cost_order, route_of, select_routes


LETTERS = ["SSSS", "RRRR", "SSRR", "SRTT", "STRT"]
NAMES = ["dense", "read", "half", "one", "other"]


def record(right: str, number: int = 0) -> RouteRecord:
    verdicts = [sign == "+" for sign in right]
    return RouteRecord(str(number), "?", ("x",), NAMES, LETTERS, ["x"] * 5, verdicts)


@pytest.mark.parametrize(
    ("right", "route"),
    [
        ("+++++", "read"),
        ("+----", "dense"),
        ("+-+--", "half"),
        ("+-+++", "one"),  # one and other cost the same: the first one named
        ("+--++", "one"),
        ("+-+-+", "other"),
        ("-++++", None),
        ("-----", None),
    ],
)
def test_the_cheapest_that_is_right_where_the_largest_is(right, route):
    place = route_of(record(right).right, LETTERS, "drop")
    assert (None if place is None else NAMES[place]) == route
    lost = route_of(record(right).right, LETTERS, "cheapest")
    assert NAMES[lost] == (route or "read")


def test_what_costs_more():
    assert sorted(LETTERS, key=cost_order) == ["RRRR", "SRTT", "STRT", "SSRR", "SSSS"]
    assert cost_order("SSRR") > cost_order("SSRT") > cost_order("SSTT") > cost_order("SRRR")


def test_rows_by_choice(caplog):
    caplog.set_level("INFO")
    records = [record(right, number) for number, right in enumerate(["+++++", "+-+--", "-++++", "+----"])]
    choices = ["half", "dense", "read"]
    routes = select_routes(records, choices, ["SSRR", "SSSS", "RRRR"], "drop")
    assert [(found.id, choices[route]) for found, route in routes] == [("0", "read"), ("1", "half"), ("3", "dense")]
    assert "1 of 4 rows dropped: the largest configuration is wrong" in caplog.text
    kept = select_routes(records, choices, ["SSRR", "SSSS", "RRRR"], "cheapest")
    assert [choices[route] for _, route in kept] == ["read", "half", "read", "dense"]


@pytest.mark.parametrize(
    ("choices", "letters", "message"),
    [
        (["dense", "thin"], ["SSSS", "STTT"], "do not tell what 'thin' answers, only \\['dense', 'read'"),
        (["dense", "half"], ["SSSS", "SSSR"], "made with 'half' as SSRR, which is SSSR in this checkpoint"),
        (["dense", "read"], ["SSSS", "RRRR"], "needs rows with different choices; here {'read': 2}"),
    ],
)
def test_labels_that_do_not_fit(choices, letters, message):
    with pytest.raises(ValueError, match=message):
        select_routes([record("+++++"), record("+++++", 1)], choices, letters, "drop")
