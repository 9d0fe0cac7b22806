"""The table of what a question costs at real sizes."""

from hub_release.measure import cost as cost_table


def test_zooming_costs_more_than_coarse_and_less_than_large(capsys) -> None:
    assert cost_table.main(["--large", "1024", "--small", "256", "--crop", "256"]) == 0
    table = capsys.readouterr().out
    rows = [[float(cell.split()[0]) for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == 4 and len(rows[0]) == len(cost_table.MODELS)
    for large, small, closed, zoomed in zip(*rows):
        assert max(small, closed) < zoomed < large


def test_budgets_move_the_costs() -> None:
    config, _ = cost_table.MODELS["3B"].config(zooms=True)
    less, more = (cost_table.costs(config, 1024, 256, crop, 64) for crop in (100, 400))
    small, cropped = list(less)[1], list(less)[3]
    assert less[small] == more[small]
    assert less[cropped] < list(more.values())[3]
