"""The composite configuration: what it holds, what it refuses, and that it survives saving."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, LlavaConfig, Qwen2_5_VLConfig

from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from modeling_qzoom.backbones_qzoom import spec_for_model_type
from tests.families import FAMILY
from tests.tiny import FAMILIES, tiny_model, vlm_config


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
    "crop_budget": "need",
    "crop_target_tokens": 6,
    "region_blur": "grid",
    "region_min_peak": 0.03,
    "region_min_contrast": 3.0,
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
    assert config.video_token_id == (config.vlm_config.video_token_id if FAMILY[family].takes_videos else None)
    assert config.sub_configs.keys() == {"vlm_config"}


def test_unknown_keywords_are_kept(tmp_path):
    make_config(trained_by="us", pad_token_id=3).save_pretrained(tmp_path)
    loaded = QZoomConfig.from_pretrained(tmp_path)
    assert loaded.trained_by == "us"
    assert QZoomConfig.from_pretrained(tmp_path, gate_threshold=0.9).gate_threshold == 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_follow_the_vlm(tied):
    assert QZoomConfig(vlm_config=Qwen2_5_VLConfig(tie_word_embeddings=tied)).tie_word_embeddings is tied
    for given in (None, {"model_type": "qwen2_5_vl"}):  # nothing there that would say otherwise
        assert QZoomConfig(vlm_config=given, tie_word_embeddings=tied).vlm_config.tie_word_embeddings is tied


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
        ({"presets": {1: {}}}, "presets must be a dict of options by preset name"),
        ({"has_gate": 1}, "has_gate must be True or False, got 1"),
        ({"has_gate": None}, "has_gate must be True or False"),
        ({"min_tokens": True}, "min_tokens must be a positive number"),
        ({"min_tokens": 0}, "min_tokens must be a positive number"),
        ({"max_tokens": [16]}, "max_tokens must be a positive number"),
        ({"max_tokens": 8.0}, "max_tokens must be a positive number"),
        ({"min_tokens": 17, "max_tokens": 16}, r"min_tokens \(17\) is larger than max_tokens \(16\)"),
        ({"image_mean": 0.5}, "image_mean must be three finite numbers"),
        ({"image_mean": []}, "image_mean must be three finite numbers"),
        ({"image_mean": "abc"}, "image_mean must be three finite numbers"),
        ({"image_mean": [0.1, 0.2, float("nan")]}, "image_mean must be three finite numbers"),
        ({"image_std": [0.1, 0.2, float("inf")]}, "image_std must be three finite numbers"),
        ({"image_std": [0.1, True, 0.2]}, "image_std must be three finite numbers"),
        ({"image_std": [0.1, 0.2, 0.0]}, "image_std must be above 0"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a name or None, got 3"),
        ({"base_model_revision": ["main"]}, "base_model_revision must be a name or None"),
        ({"lora_subfolder": ""}, "lora_subfolder must be a name or None"),
        ({"lora_subfolder": "../other"}, "lora_subfolder must be a folder inside"),
        ({"lora_subfolder": "/etc"}, "lora_subfolder must be a folder inside"),
        ({"preset": {}}, "no field 'preset'; did you mean 'presets'"),
        ({"Branch-Layer": 3}, "no field 'Branch-Layer'; did you mean 'branch_layer'"),
        ({"crop_max_token": 3}, "no field 'crop_max_token'; did you mean 'crop_max_tokens'"),
        ({"text_config": {"hidden_size": 3}}, "text_config is the VLM's own and belongs into vlm_config"),
        ({"image_token_id": 3}, "image_token_id is the VLM's own"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, but vlm_config, which decides, says False"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes', but vlm_config"),
    ],
)
def test_each_misuse_has_its_own_message(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["qwen2_5_vl"], "vlm_config must be a dict or a configuration of transformers"),
        ({"model_type": 7}, "vlm_config: model_type must be a name"),
        ({"text_config": 7}, "vlm_config is no 'qwen2_5_vl' configuration: .*text_config"),
        ({"model_type": "llava", "vision_config": {"patch_size": "big"}}, "no 'llava' configuration: .*patch_size"),
    ],
)
def test_vlm_config_that_is_none(value, message):
    with pytest.raises(ValueError, match=message):
        QZoomConfig(vlm_config=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regoin_threshold": 0.5}, "did you mean 'region_threshold'"),
        ({"image_std": [0.5, 0.5, -0.5]}, "image_std must be above 0"),
        ({"crop_min_tokens": "4"}, "crop_min_tokens must be a positive number"),
        ({"vlm_config": None, "branch_layer": "3"}, "branch_layer must be a whole number"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, but vlm_config"),
    ],
)
def test_a_file_that_was_edited_by_hand(fields, message, tmp_path):
    make_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    for load in (QZoomConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_fields_that_replace_those_of_a_file_are_checked_too(tmp_path):
    make_config(max_tokens=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is larger than max_tokens"):
        QZoomConfig.from_pretrained(tmp_path, min_tokens=20)
    with pytest.raises(ValueError, match="did you mean 'image_mean'"):
        QZoomConfig.from_pretrained(tmp_path, image_means=[0.5] * 3)
    assert QZoomConfig.from_pretrained(tmp_path, tie_word_embeddings=True).vlm_config.tie_word_embeddings


def test_what_was_assigned_is_checked_before_it_is_used_or_saved(tmp_path):
    config = make_config()
    config.image_std = [0.5, 0.5]
    with pytest.raises(ValueError, match="image_std must be three finite numbers"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_std must be three finite numbers"):
        QZoomForConditionalGeneration(config)
    model = tiny_model("llava")
    model.config.has_gate = "no"
    with pytest.raises(ValueError, match="has_gate must be True or False"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_and_paths_of_other_libraries(tmp_path):
    numbers = {"min_tokens": np.int64(4), "branch_layer": np.int32(3), "image_mean": np.array([0.1, 0.2, 0.3])}
    make_config(**numbers, base_model_name_or_path=Path("some") / "base").save_pretrained(tmp_path)
    loaded = QZoomConfig.from_pretrained(tmp_path)
    assert (loaded.min_tokens, loaded.branch_layer, loaded.image_mean) == (4, 3, [0.1, 0.2, 0.3])
    assert loaded.base_model_name_or_path == str(Path("some/base"))


@pytest.mark.parametrize(
    "name", ["num_labels", "torch_dtype", "image_size", "subfolder_of_mine", "max_length", "use_cache"]
)
def test_foreign_fields_pass(name):
    make_config(**{name: {"torch_dtype": "float32"}.get(name, 3)})


def test_a_foreign_configuration_is_not_overwritten(tmp_path):
    vlm_config("llava").save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="not that of a Q-Zoom model .model_type 'llava'"):
        make_config("llava").save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_where_a_plain_vlm_has_them(family, tmp_path):
    """Trainers and adapters read `config.text_config`, or the same name in its dict form."""
    config = make_config(family)
    assert config.text_config is config.get_text_config()
    assert config.to_dict()["text_config"]["hidden_size"] == 64
    with pytest.raises(AttributeError):
        config.text_config = {}
    config.save_pretrained(tmp_path)
    assert "text_config" not in json.loads((tmp_path / "config.json").read_text())  # it is in vlm_config once
    assert QZoomConfig(**config.to_dict()).to_dict() == config.to_dict()
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    assert QZoomConfig.from_pretrained(tmp_path).text_config.num_hidden_layers == 6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_tuning_finds_its_sizes(family):
    peft = pytest.importorskip("peft", reason="the extra 'train' is not installed")
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        prompted = peft.get_peft_model(tiny_model(family), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
        found = prompted.active_peft_config
        assert (found.num_layers, found.num_attention_heads) == (6, 2 if kind is peft.PrefixTuningConfig else 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_tied(family, tied, tmp_path):
    given = vlm_config(family)
    given.tie_word_embeddings = not tied
    config = QZoomConfig(vlm_config=given, branch_layer=3, branch_depth=2)
    config.tie_word_embeddings = tied
    model = QZoomForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for found in (model, QZoomForConditionalGeneration.from_pretrained(tmp_path)):
        assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) is tied
        assert found.config.tie_word_embeddings is found.config.vlm_config.tie_word_embeddings is tied


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
