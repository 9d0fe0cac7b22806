"""The label rule on maps made by hand."""

import torch

from modeling_qzoom.training.region_labels import TriStateRule, grounding_scores, pool_map, tri_state


def _map(h: int = 8, w: int = 8) -> torch.Tensor:
    return torch.full((h, w), 0.001)


def test_three_states() -> None:
    attention = _map()
    attention[3, 4], attention[3, 5] = 0.4, 0.11  # foreground: above a quarter of the peak
    attention[3, 3] = 0.09  # inside the grown box, below: unknown
    attention[7, 7] = 0.03  # outside it, above a twentieth of the peak: unknown
    labels = tri_state(attention)
    assert labels[3, 4] == labels[3, 5] == 1
    assert (labels == 1).sum() == 2
    assert (labels[2:5, 3:7] == -100).sum() == 10
    assert labels[7, 7] == -100
    assert (labels == 0).sum() == 64 - 12 - 1


def test_sinks_are_never_foreground() -> None:
    attention, sinks = _map(), torch.zeros(8, 8)
    attention[0, 0], sinks[0, 0] = 0.9, 0.5
    attention[5, 5] = 0.2
    labels = tri_state(attention, sinks)
    assert labels[5, 5] == 1 and labels[0, 0] == 0


def test_maps_that_say_nothing_are_ignored() -> None:
    assert (tri_state(_map()) == -100).all()
    scattered = _map()
    scattered[0, 0] = scattered[7, 7] = 0.3
    assert (tri_state(scattered) == -100).all()


def test_growth_is_a_parameter_and_stops_at_the_edge() -> None:
    attention = _map()
    attention[0, 0] = 0.5
    assert (tri_state(attention, rule=TriStateRule(growth=0)) == 0).sum() == 63
    assert (tri_state(attention) == 0).sum() == 60


def test_pooling_keeps_sums() -> None:
    torch.manual_seed(0)
    attention = torch.rand(12, 9)
    pooled = pool_map(attention, (8, 6))
    assert pooled.shape == (8, 6)
    torch.testing.assert_close(pooled.sum(), attention.sum())
    torch.testing.assert_close(pooled[:4, :2].sum(), attention[:6, :3].sum())
    torch.testing.assert_close(pool_map(attention, (12, 9)), attention)


def test_grounding_scores_find_the_head_that_looks() -> None:
    maps = torch.full((2, 3, 4, 4), 1 / 16)
    maps[1, 2] = 0
    maps[1, 2, 1, 1] = 1.0
    inside = torch.zeros(4, 4)
    inside[1, 1] = 1.0
    scores = grounding_scores([maps], [inside])
    assert scores.argmax() == 5 and scores[1, 2] == 1.0
