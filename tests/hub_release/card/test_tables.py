"""Markdown of figures: names, conditions, both splits, seeds."""

from hub_release.card.tables import figure_table, spread_table


def test_the_figure_table_names_its_conditions_and_both_splits() -> None:
    measured = {
        "summary": {"a": 0.25},
        "intervals": {"a": [0.2, 0.3]},
        "other": {"multi_accuracy_zoom": 0.5, "rows": 3},
        "conditions": {"command": "run it", "dtype": "float32"},
    }
    shifted = {"summary": {"a": 0.125}, "other": {"multi_accuracy_zoom": 0.0}}
    table = figure_table(measured, shifted)
    assert "| a | 0.250 | 0.200 – 0.300 | 0.125 |" in table
    assert "| multi_accuracy_zoom | 0.500 | | 0.000 |" in table and "rows" not in table
    assert "`run it`: dtype float32." in table


def test_the_spread_table_has_a_row_a_figure() -> None:
    spread = {"recall": {"lowest": 0.5, "mean": 0.625, "highest": 0.75}}
    assert "| recall | 0.500 | 0.625 | 0.750 |" in spread_table({"seeds": 2, "rows": 8, "spread": spread})
