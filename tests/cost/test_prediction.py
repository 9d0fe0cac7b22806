"""`zoom_cost`: predictions equal what calls cost, without weights, and bad questions get one clear error."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_qzoom import InputError, QZoomConfig, UnsupportedError, zoom_cost
from modeling_qzoom.backbones_qzoom import token_grid_of
from modeling_qzoom.cost_prediction_qzoom import square_grid
from tests.invariants.test_flops import PEAK, ROW, generate_flops, large_inputs, large_model
from tests.tiny import FAMILIES, FAMILY, tiny_model, vlm_config


def config_of(family: str, **fields) -> QZoomConfig:
    return QZoomConfig(vlm_config=vlm_config(family), branch_layer=3, branch_depth=2, **fields)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"gate_branch": "light", "keep_share": 0.25}], ids=["full", "light"])
def test_a_prediction_is_what_the_call_costs(family, options):
    model, inputs = large_model(family), large_inputs(family, [ROW])
    ids = inputs["input_ids"][0]
    image = ids == model.config.image_token_id
    counted, (report,) = generate_flops(model, inputs, gate_threshold=0, **PEAK, **options)
    budget = FAMILY[family].budget(int(image.sum()), int(image.sum()))
    lengths = {"text_tokens": len(ids) - int(image.sum()), "prefix_tokens": int(image.nonzero()[0, 0])}
    side = token_grid_of(model.config.vlm_config).token_side
    size = ROW.grids[0][0] * side, ROW.grids[0][1] * side
    cost = model.zoom_cost(size, crop_tokens=report.crop_tokens, **lengths, **budget, **options)
    assert cost.zoomed.flops == pytest.approx(counted, rel=0.01)
    assert cost.zoomed.visual_tokens - cost.plain.visual_tokens == report.crop_tokens
    skipped, _ = generate_flops(model, inputs, gate_threshold=1.5, **options)
    assert cost.skipped.flops == pytest.approx(skipped, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_are_needed(family):
    config = config_of(family, **FAMILY[family].budget(16, 64))
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    cost = empty.zoom_cost((300, 200))
    assert (
        cost
        == zoom_cost(config, (300, 200))
        == tiny_model(family, **FAMILY[family].budget(16, 64)).zoom_cost((300, 200))
    )
    assert cost.plain.flops == cost.to_dict()["plain"]["flops"]


def test_options_are_those_of_generate():
    config = config_of("qwen2_5_vl", min_tokens=4, max_tokens=64, presets={"fast": {"keep_share": 0.0}})
    full, fast = zoom_cost(config, (300, 200)), zoom_cost(config, (300, 200), effort="fast")
    assert fast.zoomed.flops < full.zoomed.flops and fast.options.keep_share == 0
    model = tiny_model("qwen2_5_vl", gate_branch="light")
    model.generation_config.region_branch = "light"
    assert (model.zoom_cost((300, 200)).options.gate_branch, model.zoom_cost((300, 200)).options.region_branch) == (
        "light",
        "light",
    )


def test_modes_pay_for_what_runs():
    config = config_of("qwen2_5_vl", min_tokens=4, max_tokens=64)
    auto, always, never = (zoom_cost(config, (300, 200), zoom=zoom) for zoom in ("auto", "always", "never"))
    gateless = zoom_cost(config_of("qwen2_5_vl", min_tokens=4, max_tokens=64, has_gate=False), (300, 200))
    assert never.plain == never.skipped == never.zoomed == auto.plain
    assert always.zoomed == gateless.zoomed and always.zoomed.flops < auto.zoomed.flops
    assert auto.mean_flops(0.5) == (auto.skipped.flops + auto.zoomed.flops) / 2


def test_crops_by_tokens_by_box_or_by_budget():
    config = config_of("qwen2_5_vl", min_tokens=4, max_tokens=64)
    assert zoom_cost(config, (300, 200)).crop_grid == (8, 8)
    assert zoom_cost(config, (300, 200), crop_tokens=24).crop_grid == (4, 6)
    assert zoom_cost(config, (300, 200), crop_max_tokens=16).crop_grid == (4, 4)
    assert zoom_cost(config, (300, 200), box=(0, 0, 56, 112)).crop_grid == (4, 2)
    assert zoom_cost(config, (3000, 200), max_tokens=128).coarse_grid == (43, 2)


def test_grids_near_a_square():
    grids = [square_grid(tokens) for tokens in (1, 2, 7, 256, 384, 2048, 257)]
    assert grids == [(1, 1), (1, 2), (2, 3), (16, 16), (16, 24), (32, 64), (16, 16)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"image_size": (300,)}, "image_size must be (height, width)"),
        ({"image_size": (0, 20)}, "image_size must be (height, width)"),
        ({"text_tokens": -1}, "text_tokens must be a positive whole number"),
        ({"prefix_tokens": 0}, "prefix_tokens must be a positive whole number"),
        ({"text_tokens": 5, "prefix_tokens": 5}, "text_tokens (5) counts the 5 tokens before the image"),
        ({"crop_tokens": 16, "box": (0, 0, 9, 9)}, "pass one of them"),
        ({"crop_tokens": 0}, "crop_tokens must be a positive number"),
        ({"crop_tokens": 32, "crop_max_tokens": 16}, "crop_tokens (32) is larger than crop_max_tokens (16)"),
        ({"box": (0, 0, 900, 9)}, "box must be (x0, y0, x1, y1) in pixels inside the image of 300 × 200"),
        ({"box": (5, 5, 5, 9)}, "box must be"),
        ({"keepshare": 0.5}, "did you mean keep_share?"),
        ({"shape": 0.5}, "the options are"),
        ({"keep_share": 2}, "keep_share must be a share"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens (9) is larger than max_tokens (4)"),
    ],
)
def test_bad_questions(call, message):
    config = config_of("qwen2_5_vl", min_tokens=4, max_tokens=64)
    with pytest.raises(InputError, match=re.escape(message)):
        zoom_cost(config, **{"image_size": (300, 200), **call})


def test_unknown_budgets():
    with pytest.raises(InputError, match="the coarse budget is unknown"):
        zoom_cost(config_of("qwen2_5_vl"), (300, 200))
    with pytest.raises(InputError, match="the crop's budget is unknown"):
        zoom_cost(config_of("qwen2_5_vl"), (300, 200), max_tokens=64)
    fixed = SimpleNamespace(config=config_of("llava"))
    with pytest.raises(UnsupportedError, match="images of this backbone have one size"):
        zoom_cost(fixed.config, (300, 200), max_tokens=64)
    with pytest.raises(UnsupportedError, match="always have 16 tokens, not 20"):
        zoom_cost(fixed.config, (300, 200), crop_tokens=20)
