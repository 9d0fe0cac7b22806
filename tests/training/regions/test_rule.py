"""The label rule on maps made by hand."""

import pytest
import torch

from modeling_qzoom.training.regions.config import LabelRule
from modeling_qzoom.training.regions.record import RegionRecord
from modeling_qzoom.training.regions.rule import covered_cells, load_region_targets, pool_map, tri_state


def _map(h: int = 8, w: int = 8) -> torch.Tensor:
    return torch.full((h, w), 0.001)


def _labels(attention, sinks=None, content=None, **rule) -> torch.Tensor:
    return tri_state(attention, sinks, LabelRule(**rule), content)


def test_three_states() -> None:
    attention = _map()
    attention[3, 4], attention[3, 5] = 0.4, 0.11  # foreground: above a quarter of the peak
    attention[3, 3] = 0.09  # inside the grown box, below: unknown
    attention[7, 7] = 0.03  # outside it, above a twentieth of the peak: unknown
    labels = _labels(attention)
    assert labels[3, 4] == labels[3, 5] == 1
    assert (labels == 1).sum() == 2
    assert (labels[2:5, 3:7] == -100).sum() == 10
    assert labels[7, 7] == -100
    assert (labels == 0).sum() == 64 - 12 - 1


def test_thresholds_are_shares_of_the_peak() -> None:
    attention = _map()
    attention[3, 4], attention[3, 5] = 0.4, 0.09
    assert _labels(attention)[3, 5] == -100
    assert _labels(attention, foreground=0.2)[3, 5] == 1
    assert torch.equal(_labels(attention * 0.1), _labels(attention))


def test_sinks_are_never_foreground() -> None:
    attention, sinks = _map(), torch.zeros(8, 8)
    attention[0, 0], sinks[0, 0] = 0.9, 0.5
    attention[5, 5] = 0.2
    attention[4, 5], sinks[4, 5] = 0.2, 0.01
    labels = _labels(attention, sinks)
    assert labels[5, 5] == 1
    assert labels[0, 0] == 0, "a sink outside the box is background"
    assert labels[4, 5] == -100, "a sink inside it is unknown"
    assert _labels(attention, sinks, sink=0.6)[0, 0] == 1
    assert _labels(attention, sinks, remove_sinks=False)[0, 0] == 1
    assert _labels(attention)[0, 0] == 1


def test_maps_that_say_nothing_are_ignored() -> None:
    assert (_labels(_map()) == -100).all()
    scattered = _map()
    scattered[0, 0] = scattered[7, 7] = 0.3
    assert (_labels(scattered) == -100).all()
    assert (_labels(scattered, largest_box=1.1) == 1).sum() == 2
    sinks = torch.zeros(8, 8)
    sinks[0, 0] = 1.0
    only_a_sink = _map()
    only_a_sink[0, 0] = 0.9
    assert (_labels(only_a_sink, sinks) == -100).all()
    assert (_labels(torch.zeros(8, 8), faintest_peak=0.0) == -100).all()


def test_a_box_of_half_the_grid_is_too_large() -> None:
    attention = _map()
    attention[1, 1] = attention[2, 6] = 0.3  # box of 2 × 6 cells, grown to 4 × 8
    assert (_labels(attention) == -100).all()
    assert (_labels(attention, largest_box=0.51) == 1).sum() == 2
    assert (_labels(attention, dilation=0) == 1).sum() == 2


def test_dilation_stops_at_the_edge() -> None:
    attention = _map()
    attention[0, 0] = 0.5
    assert (_labels(attention, dilation=0) == 0).sum() == 63
    assert (_labels(attention) == 0).sum() == 60
    assert (_labels(attention, dilation=2) == 0).sum() == 55


def test_without_the_third_state_the_rest_is_background() -> None:
    attention = _map()
    attention[3, 4], attention[3, 3], attention[7, 7] = 0.4, 0.09, 0.03
    labels = _labels(attention, tri_state=False)
    assert labels[3, 4] == 1 and (labels == 0).sum() == 63
    assert (_labels(_map(), tri_state=False) == -100).all()


def test_padding_is_background_and_does_not_set_the_peak() -> None:
    attention = _map()
    attention[0, 0] = 0.9
    attention[4, 4], attention[4, 5] = 0.2, 0.06
    attention[2, 7] = 0.15  # in the padding, right of the foreground
    labels = _labels(attention, content=(1.0, 2.0, 6.0, 8.0))
    assert labels[4, 4] == labels[4, 5] == 1
    assert (labels[:2] == 0).all() and (labels[:, :1] == 0).all()
    assert (labels[:, 6:] == 0).all(), "also inside the grown box"


def test_covered_cells() -> None:
    shares = covered_cells((0.5, 1.0, 2.0, 9.0), (3, 4))
    torch.testing.assert_close(shares, torch.tensor([[0.0] * 4, [0.5, 1, 0, 0], [0.5, 1, 0, 0]]))
    assert covered_cells((5.0, 5.0, 6.0, 6.0), (3, 4)).sum() == 0


def test_pooling_keeps_sums() -> None:
    attention = torch.rand(12, 9)
    pooled = pool_map(attention, (8, 6))
    assert pooled.shape == (8, 6)
    torch.testing.assert_close(pooled.sum(), attention.sum())
    torch.testing.assert_close(pooled[:4, :2].sum(), attention[:6, :3].sum())
    torch.testing.assert_close(pool_map(attention, (12, 9)), attention)


def _record(attention: torch.Tensor, sinks: torch.Tensor | None = None, content=None) -> RegionRecord:
    """As it comes back from parquet: lists of Python numbers."""
    sinks = torch.zeros_like(attention) if sinks is None else sinks
    row = {"id": "0", "image_id": "0", "question": "?", "answers": [], "response": ""}
    maps = {"grounding": attention.flatten().tolist(), "sinks": sinks.flatten().tolist()}
    return RegionRecord.from_row(
        {**row, **maps, "height": attention.shape[0], "width": attention.shape[1], "content": content}
    )


def test_targets_on_the_own_grid_are_the_rule() -> None:
    attention, sinks = torch.rand(6, 9) ** 6, torch.rand(6, 9) * 0.02
    found = load_region_targets(_record(attention, sinks), (6, 9), LabelRule(largest_box=2.0))
    assert torch.equal(found, _labels(attention, sinks, largest_box=2.0))
    assert found.dtype == torch.long and (found == 1).any() and (found == 0).any()


@pytest.mark.parametrize("grid", [(8, 6), (5, 7), (32, 24)])
def test_targets_follow_the_place_to_another_grid(grid) -> None:
    attention = torch.full((16, 12), 1e-4)
    attention[4, 9] = 0.3
    labels = load_region_targets(_record(attention), grid, LabelRule(dilation=0))
    assert labels.shape == grid
    rows, columns = (labels == 1).nonzero(as_tuple=True)
    x, y = 9.5 / 12 * grid[1], 4.5 / 16 * grid[0]
    assert rows.min() <= y <= rows.max() + 1 and columns.min() <= x <= columns.max() + 1
    assert (labels == 1).sum() <= 4
    unpooled = load_region_targets(_record(attention), grid, LabelRule(dilation=0, pool=False))
    assert unpooled.shape == (16, 12) and unpooled[4, 9] == 1


def test_sinks_are_judged_by_cell_before_maps_are_pooled() -> None:
    attention, sinks = torch.full((16, 16), 1e-4), torch.full((16, 16), 0.004)
    attention[2, 3], attention[12, 12] = 0.3, 0.9
    sinks[12, 12] = 0.02
    labels = load_region_targets(_record(attention, sinks), (4, 4), LabelRule(dilation=0))
    assert labels[0, 0] == 1 and labels[3, 3] == 0
    assert (labels == 1).sum() == 1


def test_padding_follows_to_another_grid() -> None:
    attention = torch.full((8, 8), 1e-4)
    attention[4, 4] = 0.3
    attention[0, 0] = 0.9
    labels = load_region_targets(_record(attention, content=[0.0, 2.0, 8.0, 6.0]), (4, 4), LabelRule(dilation=0))
    assert labels[2, 2] == 1 and (labels[0] == 0).all() and (labels[3] == 0).all()
