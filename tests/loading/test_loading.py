"""`from_backbone`, full save and reload, `from_pretrained` arguments, and refusals."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from tests.families import FAMILY
from tests.loading_fixtures import (
    CLOSE,
    ZOOM_CONFIG,
    answer,
    attach,
    edit_weights,
    plain_folder,
    weight_names,
    weights_equal,
)
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model, tiny_vlm


load = QZoomForConditionalGeneration.from_pretrained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["object", "hub", "flat"])
def test_branches_are_copies_of_the_layers_above_k(family, layout, tmp_path):
    vlm = tiny_vlm(family)
    source = vlm
    if layout != "object":
        source = plain_folder(family, tmp_path / "base", save_original_format=layout == "hub")
        nested = any(name.startswith("model.language_model.layers") for name in weight_names(source))
        assert nested == (
            layout == "flat" or not FAMILY[family].two_layouts
        )  # the layouts do differ where a family has two
    model = QZoomForConditionalGeneration.from_backbone(
        source, branch_layer=2, branch_depth=3, zoom_config=ZOOM_CONFIG[family]
    )
    layers = vlm.get_decoder().layers
    for index in range(3):
        assert weights_equal(model.zoom.gate.layers[index], layers[2 + index])
    for index in range(2):
        assert weights_equal(model.zoom.region.layers[index], layers[2 + index])
    scorer = model.zoom.region.scorer
    for name in ("q_proj", "k_proj"):
        assert weights_equal(getattr(scorer, name), getattr(layers[4].self_attn, name))
    assert weights_equal(scorer.input_layernorm, layers[4].input_layernorm)
    assert len(model.zoom.region.layers) == 2
    inputs = plain_inputs(make_inputs(family, [Row(["a ", None, " b?"], [(2, 3)])]))
    assert torch.equal(model(**inputs).logits, vlm(**inputs).logits)


def test_from_backbone_shares_no_weight_with_the_decoder():
    model = attach(tiny_vlm("qwen2_5_vl"), "qwen2_5_vl")
    owners = {parameter.data_ptr() for parameter in model.vlm.parameters()}
    assert not any(parameter.data_ptr() in owners for parameter in model.zoom.parameters())


def test_from_backbone_without_gate():
    model = attach(tiny_vlm("qwen2_5_vl"), "qwen2_5_vl", has_gate=False)
    assert model.zoom.gate is None
    assert not any("gate." in name and name.startswith("zoom.gate") for name in model.state_dict())


def test_from_backbone_passes_dtype_and_attention_on(qwen_full):
    model = attach(qwen_full[0], "qwen2_5_vl", dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_decoder().config._attn_implementation == "eager"
    assert model.zoom.gate.layers[0].self_attn.config._attn_implementation == "eager"
    assert model.config.base_model_name_or_path == qwen_full[0]


def test_from_backbone_keeps_the_attention_of_a_loaded_vlm(qwen_full):
    vlm = AutoModelForImageTextToText.from_pretrained(qwen_full[0], attn_implementation="eager")
    model = attach(vlm, "qwen2_5_vl")
    assert model.get_decoder().config._attn_implementation == "eager"
    assert model.zoom.region.layers[0].self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize("form", ["untyped", "flat"])
def test_text_config_as_a_raw_dict(qwen_full, tmp_path, form):
    """RL-tuned repositories store the decoder's configuration without a type, older ones not as a part of its own."""
    config = json.loads((tmp_path / plain_folder("qwen2_5_vl", tmp_path / "raw") / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key != "model_type"}
    config |= {"text_config": text} if form == "untyped" else text
    (tmp_path / "raw" / "config.json").write_text(json.dumps(config))
    model = attach(str(tmp_path / "raw"), "qwen2_5_vl")
    assert answer(model, "qwen2_5_vl").difference(answer(load(qwen_full[1]), "qwen2_5_vl")) < CLOSE
    model.save_pretrained(tmp_path / "full")
    assert weights_equal(load(tmp_path / "full"), model)


def test_unknown_backbone_names_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3"}))
    with pytest.raises(ValueError, match=r"idefics3.*llava.*qwen2_5_vl.*qwen3_vl"):
        QZoomForConditionalGeneration.from_backbone(tmp_path, branch_layer=2)


def test_from_backbone_refuses_loading_arguments_for_a_loaded_model():
    with pytest.raises(ValueError, match=r"dtype.*not to a loaded model"):
        attach(tiny_vlm("llava"), "llava", dtype=torch.bfloat16)


def test_from_backbone_refuses_layers_beyond_the_last(qwen_full):
    with pytest.raises(ValueError, match="branch_layer ≤ 3"):
        QZoomForConditionalGeneration.from_backbone(qwen_full[0], branch_layer=4, branch_depth=3)


def test_from_backbone_refuses_an_incomplete_base(tmp_path):
    base = plain_folder("qwen2_5_vl", tmp_path)
    edit_weights(base, drop="model.layers.5.")
    with pytest.raises(ValueError, match="lacks 12 weights of the VLM"):
        attach(base, "qwen2_5_vl")


def test_full_reload_is_equal(full):
    family, _, model, folder = full
    loaded = load(folder)
    assert weights_equal(model, loaded)
    assert answer(model, family).difference(answer(loaded, family)) < CLOSE
    assert answer(loaded, family).report.zoomed


def test_second_generation_is_equal(full, tmp_path):
    _, _, model, folder = full
    load(folder).save_pretrained(tmp_path)
    assert weights_equal(model, load(tmp_path))
    assert weight_names(tmp_path) == weight_names(folder)


def test_saved_options_come_back(tmp_path):
    presets = {"fast": {"gate_threshold": 0.5, "crop_max_tokens": 8}}
    model = tiny_model("qwen2_5_vl", region_threshold=0.25, presets=presets, image_mean=[0.1, 0.2, 0.3])
    model.generation_config.zoom = "never"
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.config.region_threshold, loaded.config.presets) == (0.25, presets)
    assert loaded.config.image_mean == [0.1, 0.2, 0.3]
    assert loaded.generation_config.zoom == "never"
    assert (loaded.config.branch_layer, loaded.config.branch_depth) == (3, 2)


def test_sharded_checkpoint_is_equal(qwen_full, tmp_path):
    model = load(qwen_full[1])
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert weights_equal(model, load(tmp_path))


def test_subfolder(qwen_full, tmp_path):
    load(qwen_full[1]).save_pretrained(tmp_path / "inner")
    assert weights_equal(load(qwen_full[1]), load(tmp_path, subfolder="inner"))


def test_given_config_and_loading_info(qwen_full):
    config = QZoomConfig.from_pretrained(qwen_full[1], gate_threshold=0.7)
    model, info = load(qwen_full[1], config=config, output_loading_info=True)
    assert model.config.gate_threshold == 0.7
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert load(qwen_full[1], gate_threshold=0.6).config.gate_threshold == 0.6
    assert load(qwen_full[1], config=str(qwen_full[1])).config.gate_threshold == 0.1


@pytest.mark.parametrize("prefix", ["zoom.gate.", "zoom.region.scorer.k_proj", "zoom.gate.head.bias", "zoom."])
def test_missing_branch_weights_raise(qwen_full, tmp_path, prefix):
    load(qwen_full[1]).save_pretrained(tmp_path)
    edit_weights(tmp_path, drop=prefix)
    with pytest.raises(ValueError, match=rf"lacks branch weights.*{prefix}"):
        load(tmp_path)


def test_unexpected_branch_weights_raise(qwen_full, tmp_path):
    load(qwen_full[1]).save_pretrained(tmp_path)
    edit_weights(tmp_path, add={"zoom.region.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"holds unknown branch weights.*zoom.region.layers.1"):
        load(tmp_path)


def test_gate_in_the_file_but_not_in_the_config_raises(qwen_full):
    with pytest.raises(ValueError, match="holds unknown branch weights.*zoom.gate"):
        load(qwen_full[1], has_gate=False)


def test_wrongly_shaped_branch_weights_raise(qwen_full, tmp_path):
    load(qwen_full[1]).save_pretrained(tmp_path)
    edit_weights(tmp_path, drop="zoom.gate.head.weight", add={"zoom.gate.head.weight": torch.zeros(1, 32)})
    with pytest.raises(ValueError, match="wrongly shaped branch weights.*zoom.gate.head.weight"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_missing_vlm_weights_raise(qwen_full, tmp_path):
    load(qwen_full[1]).save_pretrained(tmp_path)
    edit_weights(tmp_path, drop="vlm.lm_head")
    with pytest.raises(ValueError, match="lacks 1 weights of the VLM"):
        load(tmp_path)


def test_plain_folder_points_to_from_backbone(qwen_full):
    with pytest.raises(ValueError, match="plain 'qwen2_5_vl' model.*from_backbone"):
        load(qwen_full[0])
    with pytest.raises(ValueError, match="lacks branch weights"):
        load(qwen_full[0], config=QZoomConfig.from_pretrained(qwen_full[1]))


def test_nothing_needs_accelerate(full, tmp_path, monkeypatch):
    family, base, model, _ = full
    for name in ("loading_quantized_qzoom", "saving_addons_qzoom"):
        monkeypatch.setattr(sys.modules[f"modeling_qzoom.{name}"], "is_accelerate_available", lambda: False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    attached = attach(base, family)
    assert weights_equal(attached, model)
    attached.save_addon(tmp_path)
    assert weights_equal(load(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_reaches_both_parts(full, dtype):
    family, _, model, folder = full
    loaded = load(folder, dtype=dtype)
    kept = {"zoom.gate.head", "zoom.region.scorer"} if dtype == torch.float16 else set()
    for name, parameter in loaded.named_parameters():
        expected = torch.float32 if any(name.startswith(part) for part in kept) else dtype
        assert parameter.dtype == expected, name
    low, full = answer(loaded, family), answer(model, family)
    assert low.report.zoomed and torch.isfinite(low.logits).all()
    assert abs(low.report.gate_probability - full.report.gate_probability) < 0.2


def test_attention_implementation_by_part(qwen_full):
    model = load(qwen_full[1], attn_implementation={"": "eager", "vlm_config": "sdpa"})
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert model.vlm.model.visual.config._attn_implementation == "sdpa"
    eager = load(qwen_full[1], attn_implementation="eager")
    assert eager.get_decoder().config._attn_implementation == "eager"
    assert eager.zoom.gate.layers[0].self_attn.config._attn_implementation == "eager"
    mixed = {"vlm_config": {"text_config": "eager", "vision_config": "sdpa"}}
    split = load(qwen_full[1], attn_implementation=mixed)
    assert split.zoom.region.layers[0].self_attn.config._attn_implementation == "eager"
    assert split.vlm.model.visual.config._attn_implementation == "sdpa"
    difference = answer(model, "qwen2_5_vl").difference(answer(eager, "qwen2_5_vl"))
    assert 0 < difference < 1e-3  # another kernel ran, in the branches as well


def test_attention_implementation_can_be_switched(qwen_full):
    model = load(qwen_full[1])
    model.set_attn_implementation("eager")
    assert model.zoom.gate.layers[0].self_attn.config._attn_implementation == "eager"


def test_offloaded_to_cpu_and_disk(full, tmp_path):
    family, _, model, folder = full
    device_map = {"vlm.model.language_model": "disk", "vlm.lm_head": "disk", "zoom": "disk"}
    device_map |= {f"vlm.{name}": "cpu" for name in FAMILY[family].vision_modules}
    offloaded = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert next(offloaded.zoom.gate.parameters()).device.type == "meta"
    assert next(offloaded.get_decoder().layers[0].parameters()).device.type == "meta"
    assert answer(model, family).difference(answer(offloaded, family)) < CLOSE
    offloaded.save_pretrained(tmp_path / "again")
    assert weights_equal(model, load(tmp_path / "again"))


def test_backbone_offloaded_before_the_branches_were_attached(full, tmp_path):
    family, base, model, _ = full
    vlm = AutoModelForImageTextToText.from_pretrained(base, device_map={"": "disk"}, offload_folder=tmp_path)
    assert answer(attach(vlm, family), family).difference(answer(model, family)) < CLOSE


def _gradients(model, family: str, mode: str) -> dict[str, torch.Tensor]:
    rows = [Row(["hello ", None, " what?"], [(4, 5)], seed=3), Row([None, "?"], [(2, 3)], seed=5)]
    inputs = make_inputs(family, rows)
    sources = inputs.pop("source_images")
    model.zero_grad(set_to_none=True)
    if mode == "branches":
        grids = FAMILY[family].grids((4, 5), (2, 3))
        targets = [(torch.rand(1, *grid, generator=torch.Generator().manual_seed(1)) > 0.5).float() for grid in grids]
        loss = model(**inputs, region_targets=targets, gate_targets=torch.tensor([1.0, 0.0])).loss
    else:
        labels = inputs["input_ids"].clone()
        labels[:, :-4] = -100
        boxes = [(0, 0, 100, 90), None]
        loss = model(**inputs, labels=labels, source_images=sources, zoom_boxes=boxes).loss
    loss.backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def _checkpoint_layers(model) -> None:
    """By its newer name, the only one without a deprecation warning, where there is one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("mode", ["branches", "fused"])
def test_gradient_checkpointing_changes_no_gradient(full, mode):
    family, _, _, folder = full
    model = load(folder).train()
    expected = _gradients(model, family, mode)
    _checkpoint_layers(model)
    assert model.zoom.gate.layers[0].gradient_checkpointing and model.get_decoder().layers[0].gradient_checkpointing
    computed = []
    counted = model.get_decoder().layers[0] if mode == "fused" else model.zoom.gate.layers[0]
    counted.self_attn.register_forward_hook(lambda *_: computed.append(1))
    given = _gradients(model, family, mode)
    assert len(computed) == 2  # once forward, once again for the gradients
    assert given.keys() == expected.keys()
    assert any(name.startswith("zoom.") for name in given) == (mode == "branches")
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_with_a_frozen_backbone(qwen_full):
    model = load(qwen_full[1]).train()
    model.vlm.requires_grad_(False)
    expected = _gradients(model, "qwen2_5_vl", "branches")
    _checkpoint_layers(model)
    model.enable_input_require_grads()
    given = _gradients(model, "qwen2_5_vl", "branches")
    assert given.keys() == expected.keys() and all(name.startswith("zoom.") for name in given)
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_crops_are_normalised_as_the_folders_images_are(tmp_path):
    folder = plain_folder("qwen3_vl", tmp_path / "base")
    attach = QZoomForConditionalGeneration.from_backbone
    assert attach(folder, branch_layer=3, branch_depth=2).config.image_mean == [0.5, 0.5, 0.5]
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    config = attach(folder, branch_layer=3, branch_depth=2).config
    assert config.image_mean == [0.1] * 3 and config.image_std == [0.2] * 3
    given = attach(folder, branch_layer=3, branch_depth=2, zoom_config={"image_mean": [0.3] * 3}).config
    assert given.image_mean == [0.3] * 3 and given.image_std == [0.2] * 3


def test_misuse_of_from_backbone(tmp_path):
    attach = QZoomForConditionalGeneration.from_backbone
    with pytest.raises(ValueError, match="no field 'gate_treshold'; did you mean 'gate_threshold'"):
        attach(tiny_vlm("qwen2_5_vl"), branch_layer=3, zoom_config={"gate_treshold": 0.4})
    with pytest.raises(ValueError, match="branch_layer must be a whole number"):
        attach(tiny_vlm("qwen2_5_vl"), branch_layer="3")
    attach(tiny_vlm("qwen2_5_vl"), branch_layer=3, branch_depth=2).save_pretrained(tmp_path / "zoom")
    with pytest.raises(ValueError, match="Q-Zoom checkpoint already; load it with from_pretrained"):
        attach(tmp_path / "zoom", branch_layer=3)
