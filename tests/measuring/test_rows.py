"""The benchmark's FLOPs: what a call really does, counted without weights, is what the closed form says."""

import pytest
import torch

from modeling_qzoom import QZoomConfig
from modeling_qzoom.measuring.hollow import counted_flops, hollow_model, with_short_tower
from modeling_qzoom.measuring.questions import crop_options, question_inputs
from modeling_qzoom.measuring.rows import VARIANTS, Setting, done_over_needed, draw, markdown, ratios, table
from tests.invariants.test_flops import count_flops, large_model
from tests.tiny import FAMILIES, FAMILY


TEXT = 48


def setting_of(family: str, **options) -> Setting:
    """Shapes that are large enough for rotary tables and the like to vanish beside the layers."""
    config = large_model(family).config
    tokens, crop = (144, 100) if FAMILY[family].has_budget else (196, None)
    return Setting(config, tokens, crop, TEXT, options)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_done_is_what_is_needed(family, name):
    counted = done_over_needed(setting_of(family, **VARIANTS[name]))
    assert set(counted) == {"skipped", "zoomed"}
    assert all(0.995 < ratio <= 1.02 for ratio in counted.values()), counted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hollow_model_does_what_a_full_one_does(family):
    model = large_model(family)
    cost = setting_of(family).cost()
    inputs = question_inputs(model.config.vlm_config, cost.coarse_grid, cost.crop_grid, text_tokens=TEXT)
    options = {**crop_options(model.config.vlm_config, cost.crop_grid), "max_new_tokens": 1, "zoom": "always"}
    hollow = hollow_model(model.config)
    counted, _ = counted_flops(lambda: hollow.generate(**inputs, **options))
    assert counted == count_flops(lambda: model.generate(**inputs, **options))
    assert sum(parameter.untyped_storage().nbytes() for parameter in hollow.parameters()) < 10_000


def test_without_a_gate_only_zooming_is_counted():
    setting = setting_of("qwen2_5_vl")
    fields = {**setting.config.to_dict(), "has_gate": False}
    gateless = Setting(QZoomConfig.from_dict(fields), setting.source_tokens, setting.crop_tokens, TEXT)
    assert set(done_over_needed(gateless)) == {"zoomed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_have_exact_lengths(family):
    config = setting_of(family).config.vlm_config
    cost = setting_of(family).cost()
    inputs = question_inputs(config, cost.coarse_grid, cost.crop_grid, rows=2, text_tokens=TEXT, prefix_tokens=9)
    ids = inputs["input_ids"]
    visual = cost.plain.visual_tokens
    assert ids.shape == (2, visual + TEXT) and ((ids == config.image_token_id).sum(1) == visual).all()
    assert int((ids[0] == config.image_token_id).nonzero()[0, 0]) == 9
    assert not torch.equal(ids[0], ids[1]) and len(inputs["source_images"]) == 2


def test_options_in_force_are_the_checkpoints_where_nothing_is_said():
    setting = setting_of("qwen2_5_vl")
    setting.config.gate_branch = "light"
    found = ratios(setting, 10)
    assert (found["gate"], found["region"], found["keep_share"]) == ("light", "full", 1.0)
    assert found["skip_over_plain"] < 1.1 and 0 < found["page_over_plain"] < 1
    named = ratios(setting_of("qwen2_5_vl", region_branch="light", keep_share=0.1), 10)
    assert (named["gate"], named["region"], named["keep_share"]) == ("full", "light", 0.1)
    assert named["zoom_over_plain"] < found["zoom_over_plain"]


def test_the_table_and_its_picture(tmp_path):
    setting = setting_of("qwen2_5_vl")
    rows = list(table(setting.config, (64, 256), 64, TEXT))
    assert len(rows) == 2 * len(VARIANTS)
    assert all(list(row["over"].values()) == sorted(row["over"].values()) for row in rows)
    assert len(markdown(rows).splitlines()) == 2 + len(rows)
    pytest.importorskip("matplotlib", reason="the extra 'stages' is not installed")
    draw(rows, str(tmp_path / "table.png"))
    assert (tmp_path / "table.png").stat().st_size > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_tower_leaves_the_decoder_alone(family):
    config = large_model(family).config
    short = with_short_tower(config)
    assert short.text_config.to_dict() == config.text_config.to_dict() and short is not config


def test_a_fixed_grid_has_one_budget():
    with pytest.raises(ValueError, match="always have 196 tokens"):
        Setting(setting_of("llava").config, 100, None).cost()
