"""The closed form of an answer's prefill against counted FLOPs, for every family."""

import pytest

from modeling_qzoom.asking.answers import Answer, _suffix_tokens
from modeling_qzoom.asking.cost import answer_flops
from modeling_qzoom.backbones_qzoom import spec_for_config, token_grid_of
from modeling_qzoom.cost_qzoom import PrefillCost
from modeling_qzoom.prompt_qzoom import marker_ids
from modeling_qzoom.zoom_options_qzoom import resolve_options
from tests.families import FAMILY
from tests.invariants.test_flops import PEAK, ROW, generate_flops, large_inputs, large_model
from tests.tiny import FAMILIES


TOLERANCE = 0.005


@pytest.fixture(params=FAMILIES)
def setting(request) -> tuple:
    """(model, inputs of one row, cost)."""
    model = large_model(request.param)
    spec = spec_for_config(model.config.vlm_config)
    options = resolve_options(PEAK, (), model.config, mrope=spec.mrope)
    return model, large_inputs(request.param, [ROW]), PrefillCost(model.config, options)


def row_answer(model, inputs: dict, report) -> Answer:
    ids = inputs["input_ids"][0]
    suffix = _suffix_tokens(ids, model.config.image_token_id, marker_ids(model.config))
    image_tokens = int((ids == model.config.image_token_id).sum())
    (grid,) = token_grid_of(model.config.vlm_config).token_grids(image_tokens, inputs.get("image_grid_thw"))
    return Answer("", report, len(ids), suffix, grid)


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("off", {"zoom": "never"}),
        ("gate_closed", {"zoom": "auto", "gate_threshold": 1.5}),
        ("gate_open", {"zoom": "auto", "gate_threshold": 0.0, **PEAK}),
        ("forced", {"zoom": "always", **PEAK}),
        ("empty_map", {"zoom": "always", "region_threshold": 1.0}),
    ],
)
def test_every_outcome_costs_what_is_counted(setting, reason: str, options: dict) -> None:
    model, inputs, cost = setting
    counted, (report,) = generate_flops(model, inputs, **options)
    assert report.reason == reason
    answer = row_answer(model, inputs, report)
    assert answer_flops(cost, answer) == pytest.approx(counted, rel=TOLERANCE)
    if report.zoomed:
        grid = cost.crop_grid(report)
        assert grid[0] * grid[1] == report.crop_tokens
        assert answer.visual_tokens == report.coarse_tokens + report.crop_tokens


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILY[family].has_budget])
@pytest.mark.parametrize("budget", ["need", "visionrl2"])
def test_crops_by_need_cost_what_is_counted(family: str, budget: str) -> None:
    model, inputs = large_model(family), large_inputs(family, [ROW])
    options = {**PEAK, "crop_budget": budget, "crop_min_tokens": 4, "crop_target_tokens": 24, "crop_max_tokens": 30}
    resolved = resolve_options(options, (), model.config, mrope=model.config.backbone.mrope)
    cost = PrefillCost(model.config, resolved)
    counted, (report,) = generate_flops(model, inputs, zoom="always", **options)
    assert report.zoomed
    grid = cost.crop_grid(report)
    assert grid[0] * grid[1] == report.crop_tokens
    assert answer_flops(cost, row_answer(model, inputs, report)) == pytest.approx(counted, rel=TOLERANCE)
    fixed = PrefillCost(model.config, resolve_options(PEAK, (), model.config, mrope=model.config.backbone.mrope))
    assert fixed.crop_grid(report) != grid


def test_a_map_below_a_minimum_costs_an_empty_one(setting) -> None:
    model, inputs, cost = setting
    counted, (report,) = generate_flops(model, inputs, zoom="always", region_min_peak=1.0, **PEAK)
    assert (report.reason, report.empty_rule) == ("empty_map", "region_min_peak")
    assert answer_flops(cost, row_answer(model, inputs, report)) == pytest.approx(counted, rel=TOLERANCE)
