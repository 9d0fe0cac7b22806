"""Options that would be without effect or out of reach are refused: misspelt, of a wrong type, too large."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tests.generation.test_options import one_row, report_of, resolve
from tests.generation_fixtures import always, shared_model


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ({"region_treshold": 0.3}, "did you mean region_threshold?"),
        ({"regionThreshold": 0.3}, "did you mean region_threshold?"),
        ({"crop_min": 4}, "did you mean crop_min_tokens?"),
        ({"crop_max_tokens_per_image": 4}, "did you mean crop_max_tokens?"),
        ({"position_allignment": "sequential"}, "did you mean position_alignment?"),
        ({"ZOOM": "never"}, "did you mean zoom?"),
        ({"zoom_mode": "never"}, "the options are"),
        ({"efort": "fast"}, "did you mean effort?"),
        ({"effrot": "fast"}, "did you mean effort?"),
        ({"return_zoom_reprots": True}, "did you mean return_zoom_reports?"),
    ],
)
@pytest.mark.parametrize("place", ["call", "model", "disk"])
def test_misspelt_options_in_a_generation_config_are_named(setting, hint, place, monkeypatch, tmp_path):
    model, settings = shared_model("qwen2_5_vl"), GenerationConfig(**setting)
    if place == "disk":
        settings.save_pretrained(tmp_path)
        settings = GenerationConfig.from_pretrained(tmp_path)
    given = {} if place == "model" else {"generation_config": settings}
    if place == "model":
        monkeypatch.setattr(model, "generation_config", settings)
    with pytest.raises(ValueError, match=f"sets '{next(iter(setting))}', which is no option.*{re.escape(hint)}"):
        model.generate(**one_row(), **given, max_new_tokens=1)


def test_attributes_of_others_in_a_generation_config_are_left_alone():
    foreign = {"max_tokens": 9, "min_tokens": 1, "reasoning_effort": "high", "stop": ["x"], "threshold": 0.2}
    settings = GenerationConfig(**foreign, gate_treshold=None, max_new_tokens=1)
    assert report_of(shared_model("qwen2_5_vl"), generation_config=settings, zoom="never").reason == "off"


@pytest.mark.parametrize("value", ["no", "True", 1, 0, 0.5, [True]])
@pytest.mark.parametrize("place", ["call", "generation config"])
def test_return_zoom_reports_is_true_or_false(value, place):
    options = {"return_zoom_reports": value}
    if place == "generation config":
        options = {"generation_config": GenerationConfig(**options)}
    with pytest.raises(ValueError, match="return_zoom_reports must be True or False"):
        shared_model("qwen2_5_vl").generate(**one_row(), **options, max_new_tokens=1)


@pytest.mark.parametrize("settings", [{"zoom": "never"}, "never", 3])
def test_what_is_no_generation_config_is_refused(settings):
    with pytest.raises(TypeError, match="generation_config must be a GenerationConfig, got a"):
        shared_model("qwen2_5_vl").generate(**one_row(), generation_config=settings)


@pytest.mark.parametrize("value", [4097, 10**30, 10**6000], ids=["one more", "many", "beyond text"])
@pytest.mark.parametrize("name", ["crop_min_tokens", "crop_max_tokens"])
def test_crops_beyond_the_model_s_positions_are_refused(name, value):
    message = f"{name} is .*, but this model's sequences hold at most 4096 tokens"
    for options in ({name: value}, {"generation_config": GenerationConfig(**{name: value})}):
        with pytest.raises(ValueError, match=message):
            shared_model("qwen3_vl").generate(**one_row("qwen3_vl"), **always(), **options, max_new_tokens=1)
    assert resolve({name: 4096}).crop_max_tokens in (None, 4096)


@pytest.mark.parametrize(
    "value",
    [10**309, -(10**6000), Fraction(10**400), "1" * 999, torch.tensor(0.5), np.ones(2)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["gate_threshold", "region_threshold"])
def test_thresholds_that_no_float_holds_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number ≥ 0") as refusal:
        resolve({name: value})
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize("value", [["auto"], {}, np.array(["auto", "never"]), 1, b"auto"])
@pytest.mark.parametrize("name", ["zoom", "region_threshold_mode", "position_alignment", "effort"])
def test_choices_are_text(name, value):
    with pytest.raises(ValueError, match=f"{name}.*(must be one of|is not a preset)"):
        resolve({name: value})
