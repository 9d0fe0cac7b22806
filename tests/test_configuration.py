"""The composite configuration: what it holds, what it refuses, and that it survives saving."""

import json

import pytest
from transformers import AutoConfig, LlavaConfig, Qwen2_5_VLConfig

from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from modeling_qzoom.backbones_qzoom import spec_for_model_type

from .tiny import FAMILIES, tiny_model, vlm_config


def make_config(family: str = "qwen2_5_vl", **fields) -> QZoomConfig:
    return QZoomConfig(vlm_config=vlm_config(family), **{"branch_layer": 3, "branch_depth": 2, **fields})


FIELDS = {
    "has_gate": False,
    "zoom": "always",
    "gate_threshold": 0.25,
    "region_threshold": 0.3,
    "region_threshold_mode": "peak",
    "crop_min_tokens": 4,
    "crop_max_tokens": 8,
    "position_alignment": "sequential",
    "effort": "fast",
    "presets": {"fast": {"gate_threshold": 0.5}, "accurate": {"gate_threshold": 0.0, "crop_max_tokens": 32}},
    "min_tokens": 4,
    "max_tokens": 16,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "base_model_name_or_path": "somebody/model",
    "base_model_revision": "abc",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    config = make_config(family, **FIELDS)
    config.save_pretrained(tmp_path)
    for loaded in (QZoomConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is QZoomConfig
        assert type(loaded.vlm_config) is type(config.vlm_config)
        assert type(loaded.get_text_config()) is type(config.get_text_config())
        assert {name: getattr(loaded, name) for name in FIELDS} == FIELDS
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_saved_file_names_what_remote_code_needs(tmp_path):
    make_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "qzoom" and saved["vlm_config"]["model_type"] == "qwen2_5_vl"
    assert saved["branch_layer"] == 3 and saved["branch_depth"] == 2


def test_defaults():
    config = make_config()
    assert (config.zoom, config.gate_threshold, config.region_threshold) == ("auto", 0.1, 0.1)
    assert config.region_threshold_mode == "absolute" and config.presets == {} and config.has_gate
    assert QZoomConfig().vlm_config.model_type == "qwen2_5_vl"


@pytest.mark.parametrize("family", FAMILIES)
def test_vlm_config_may_be_a_raw_dict(family):
    """As ZwZ stores it: nested dicts all the way down."""
    raw = json.loads(json.dumps(vlm_config(family).to_dict()))
    assert isinstance(raw["text_config"], dict)
    before = json.dumps(raw)
    config = QZoomConfig(vlm_config=raw, branch_layer=3, branch_depth=2)
    assert json.dumps(raw) == before  # the caller's dict is left alone
    assert type(config.vlm_config) is type(vlm_config(family))
    assert not isinstance(config.get_text_config(), dict)
    assert config.get_text_config().hidden_size == 64


def test_raw_dicts_without_a_model_type_are_qwen2_5_vl():
    raw = vlm_config("qwen2_5_vl").to_dict()
    del raw["model_type"]
    assert isinstance(QZoomConfig(vlm_config=raw, branch_layer=3, branch_depth=2).vlm_config, Qwen2_5_VLConfig)


@pytest.mark.parametrize("family", FAMILIES)
def test_delegated_attributes(family):
    config = make_config(family)
    assert config.get_text_config() is config.vlm_config.get_text_config()
    assert config.get_text_config(decoder=True).num_hidden_layers == 6
    assert config.image_token_id == config.vlm_config.image_token_id
    assert config.vision_config is config.vlm_config.vision_config
    assert config.video_token_id == (None if family == "llava" else config.vlm_config.video_token_id)
    assert config.sub_configs.keys() == {"vlm_config"}


def test_unknown_keywords_are_kept(tmp_path):
    make_config(trained_by="us", pad_token_id=3).save_pretrained(tmp_path)
    loaded = QZoomConfig.from_pretrained(tmp_path)
    assert loaded.trained_by == "us"
    assert QZoomConfig.from_pretrained(tmp_path, gate_threshold=0.9).gate_threshold == 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_follow_the_vlm(tied):
    assert QZoomConfig(vlm_config=Qwen2_5_VLConfig(tie_word_embeddings=tied)).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"branch_layer": 5}, r"5 \+ 2 exceeds the VLM's 6 decoder layers; choose branch_layer ≤ 4"),
        ({"branch_depth": 4}, r"3 \+ 4 exceeds"),
        ({"branch_layer": 0}, "at least 1, got K=0, T=2"),
        ({"branch_depth": 0}, "at least 1, got K=3, T=0"),
        ({"zoom": "sometimes"}, r"zoom must be one of \['auto', 'always', 'never'\], got 'sometimes'"),
        ({"gate_threshold": -0.1}, "gate_threshold must be a finite number ≥ 0"),
        ({"gate_threshold": None}, "gate_threshold must be a finite number"),
        ({"region_threshold": float("nan")}, "region_threshold must be a finite number"),
        ({"region_threshold_mode": "relative"}, "region_threshold_mode must be one of"),
        ({"crop_max_tokens": 0}, "crop_max_tokens must be a positive number of merged visual tokens"),
        ({"crop_min_tokens": 9, "crop_max_tokens": 8}, r"crop_min_tokens \(9\) is larger than crop_max_tokens \(8\)"),
        ({"position_alignment": "diagonal"}, "position_alignment must be one of"),
        ({"presets": ["fast"]}, "presets must be a dict of options by preset name"),
        ({"presets": {"fast": 0.5}}, "preset 'fast' must be a dict of options"),
        ({"presets": {"fast": {"speed": 1}}}, r"preset 'fast' sets \['speed'\]; a preset may set"),
        ({"presets": {"fast": {"gate_threshold": "low"}}}, "preset 'fast': gate_threshold must be a finite number"),
        ({"presets": {"fast": {"crop_max_tokens": 2}}, "crop_min_tokens": 4}, "preset 'fast': crop_min_tokens"),
        ({"effort": "fast"}, "effort='fast' is not a preset of this checkpoint"),
    ],
)
def test_each_misuse_has_its_own_message(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_last_possible_branch_layer():
    assert make_config(branch_layer=4).branch_layer == 4


def test_llava_has_no_continuous_positions():
    with pytest.raises(ValueError, match="needs fractional"):
        make_config("llava", position_alignment="continuous")
    with pytest.raises(ValueError, match="preset 'fast': position_alignment='continuous'"):
        make_config("llava", presets={"fast": {"position_alignment": "continuous"}})
    assert make_config("llava", position_alignment="sequential").position_alignment == "sequential"


@pytest.mark.parametrize("model_type", ["llava_next", "made_up"])
def test_unknown_backbones_list_the_known_ones(model_type):
    message = f"no row for model_type '{model_type}'; it knows .*'llava', 'qwen2_5_vl', 'qwen3_vl'.*BackboneSpec"
    with pytest.raises(ValueError, match=message):
        QZoomConfig(vlm_config={"model_type": model_type})
    with pytest.raises(ValueError, match=message):
        spec_for_model_type(model_type)


def test_unsupported_config_objects_are_refused():
    config = LlavaConfig()
    config.model_type = "llava_with_a_twist"
    with pytest.raises(ValueError, match="llava_with_a_twist"):
        QZoomConfig(vlm_config=config, branch_layer=3)


def test_models_are_built_from_the_round_tripped_config(tmp_path):
    make_config(has_gate=False).save_pretrained(tmp_path)
    model = QZoomForConditionalGeneration(QZoomConfig.from_pretrained(tmp_path))
    assert model.zoom.gate is None and len(model.zoom.region.layers) == 1


def test_options_on_a_generation_config_are_saved_with_it(tmp_path):
    """Also where the generation config was derived from the model's configuration, as for a VLM made from scratch."""
    model = tiny_model("llava")
    assert model.generation_config._from_model_config
    model.generation_config.gate_threshold = 0.77
    model.generation_config.return_zoom_reports = True
    model.save_pretrained(tmp_path)
    loaded = QZoomForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.gate_threshold == 0.77
    assert loaded.generation_config.return_zoom_reports is True
    loaded.save_pretrained(tmp_path / "again")
    again = QZoomForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.generation_config.gate_threshold == 0.77
