"""Add-ons: branches (and an unmerged LoRA) in a folder of their own, loaded together with the base they name."""

import json
import shutil
import sys

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_qzoom import QZoomForConditionalGeneration
from tests.loading_fixtures import CLOSE, answer, attach, edit_weights, plain_folder, weight_names, weights_equal
from tests.lora_support import needs_lora
from tests.tiny import FAMILIES, tiny_model, tiny_vlm


load = QZoomForConditionalGeneration.from_pretrained
# peft asks transformers in a way that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(family, model, folder of its add-on)."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = attach(plain_folder(family, folder / "base"), family)
    model.save_addon(folder / "addon")
    return family, model, folder / "addon"


@pytest.fixture
def qwen(tmp_path):
    """A model on a saved base that a test may change."""
    return attach(plain_folder("qwen2_5_vl", tmp_path / "base"), "qwen2_5_vl")


def test_addon_holds_the_branches_only(saved):
    _, model, folder = saved
    assert weight_names(folder) == {name for name in model.state_dict() if name.startswith("zoom.")}
    assert json.loads((folder / "config.json").read_text())["base_model_name_or_path"] == str(folder.parent / "base")
    assert (folder / "generation_config.json").exists() and (folder / "modeling_qzoom.py").exists()


def test_addon_and_base_load_in_one_call(saved):
    family, model, folder = saved
    loaded, info = load(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert weights_equal(model, loaded)
    assert answer(model, family).difference(answer(loaded, family)) < CLOSE


def test_full_checkpoint_from_a_loaded_addon(saved, tmp_path):
    family, model, folder = saved
    load(folder).save_pretrained(tmp_path / "full")
    assert any(name.startswith("vlm.") for name in weight_names(tmp_path / "full"))
    assert weights_equal(load(tmp_path / "full"), model)
    load(tmp_path / "full").save_addon(tmp_path / "addon")  # the full checkpoint still knows its base
    assert weights_equal(load(tmp_path / "addon"), model)


def test_addon_takes_loading_arguments(saved, tmp_path):
    family, model, folder = saved
    low = load(
        folder, dtype=torch.bfloat16, device_map="auto", attn_implementation={"": "sdpa", "vlm_config": "eager"}
    )
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert low.get_decoder().config._attn_implementation == "eager"
    assert low.zoom.region.layers[0].self_attn.config._attn_implementation == "eager"
    device_map = {"vlm": "disk", "zoom.gate": "disk", "zoom.region": "cpu"}
    offloaded = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert next(offloaded.get_decoder().parameters()).device.type == "meta"
    assert answer(model, family).difference(answer(offloaded, family)) < CLOSE
    assert not list(tmp_path.iterdir())  # read where they are, in base and add-on


def test_addon_on_a_sharded_base(saved, tmp_path):
    family, model, folder = saved
    tiny_vlm(family).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    loaded = load(folder, base_model_name_or_path=tmp_path / "sharded")
    assert weights_equal(model, loaded)
    map_to_disk = {"device_map": {"vlm": "disk", "zoom": "cpu"}, "offload_folder": tmp_path / "off"}
    offloaded = load(folder, base_model_name_or_path=tmp_path / "sharded", **map_to_disk)
    assert answer(model, family).difference(answer(offloaded, family)) < CLOSE


def test_moved_base(qwen, tmp_path):
    qwen.save_addon(tmp_path / "addon")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"base.* cannot be read.*base_model_name_or_path="):
        load(tmp_path / "addon")
    loaded = load(tmp_path / "addon", base_model_name_or_path=tmp_path / "elsewhere")
    assert weights_equal(qwen, loaded)
    assert loaded.config.base_model_name_or_path == str(tmp_path / "elsewhere")
    config = type(qwen.config).from_pretrained(tmp_path / "addon")
    given = load(tmp_path / "addon", config=config, base_model_name_or_path=tmp_path / "elsewhere")
    assert weights_equal(qwen, given)
    assert config.base_model_name_or_path == str(tmp_path / "base")  # the caller's object is left alone
    with pytest.raises(ValueError, match="cannot be read.*save_addon"):
        qwen.save_addon(tmp_path / "again")
    qwen.save_addon(tmp_path / "again", base_model_name_or_path=tmp_path / "elsewhere")
    assert weights_equal(qwen, load(tmp_path / "again"))


def test_base_without_safetensors(qwen, tmp_path):
    qwen.save_addon(tmp_path / "addon")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors.*base_model_name_or_path="):
        load(tmp_path / "addon")


def test_base_that_is_a_qzoom_checkpoint(qwen, tmp_path):
    qwen.save_addon(tmp_path / "addon")
    qwen.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="itself a Q-Zoom checkpoint"):
        load(tmp_path / "addon", base_model_name_or_path=tmp_path / "full")


def test_no_base_known(tmp_path):
    model = tiny_model("qwen2_5_vl")
    with pytest.raises(ValueError, match="no base model is known"):
        model.save_addon(tmp_path)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, drop="vlm.")
    with pytest.raises(ValueError, match="names no base model"):
        load(tmp_path)


@pytest.mark.parametrize("drop", ["zoom.gate.layers.1.", "zoom.region.scorer."])
def test_incomplete_addon(qwen, tmp_path, drop):
    qwen.save_addon(tmp_path / "addon")
    edit_weights(tmp_path / "addon", drop=drop)
    with pytest.raises(ValueError, match=f"lacks branch weights.*{drop}"):
        load(tmp_path / "addon")


def test_wrong_base(qwen, tmp_path):
    qwen.save_addon(tmp_path / "addon")
    edit_weights(tmp_path / "base", drop="model.layers.2.")
    with pytest.raises(ValueError, match="lacks 12 weights of the VLM"):
        load(tmp_path / "addon")


@pytest.mark.parametrize("name", ["vlm.lm_head.weight", "vlm.model.visual.blocks.1.mlp.down_proj.weight"])
def test_refused_after_full_fine_tuning(qwen, tmp_path, name):
    with torch.no_grad():
        qwen.get_parameter(name).view(-1)[3] += 1e-3
    with pytest.raises(
        ValueError, match=rf"1 weights of this VLM differ.*{name.removeprefix('vlm.')}.*save_pretrained"
    ):
        qwen.save_addon(tmp_path / "addon")
    assert not (tmp_path / "addon").exists()
    qwen.save_pretrained(tmp_path / "full")
    assert weights_equal(qwen, load(tmp_path / "full"))


def test_reduced_precision_is_no_fine_tuning(qwen, tmp_path):
    qwen.to(torch.bfloat16).save_addon(tmp_path / "addon")
    assert weights_equal(qwen, load(tmp_path / "addon", dtype=torch.bfloat16))


def _lora(**kwargs) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **kwargs})


def _train_lora(model) -> None:
    """B starts at zero; a trained one does not."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    model.eval()


def _by_add_adapter(model):
    model.add_adapter(_lora())


def _by_regular_expression(model):
    decoder_only = r".*language_model.*\.(q_proj|v_proj)"
    model.add_adapter(_lora(target_modules=decoder_only, rank_pattern={"layers.1.self_attn.q_proj": 2}))


def _around_the_model(model):
    peft.get_peft_model(model, _lora())


def _around_the_model_training_the_branches(model):
    peft.get_peft_model(model, _lora(target_modules=r".*language_model.*q_proj", modules_to_save=["zoom"]))
    with torch.no_grad():
        model.zoom.modules_to_save["default"].gate.head.bias.add_(0.5)


def _inside_the_vlm(model):
    peft.get_peft_model(model.vlm, _lora())


def _around_the_vlm(model):
    model.vlm = peft.get_peft_model(model.vlm, _lora())


@needs_lora
@pytest.mark.parametrize(
    "adapt",
    [
        _by_add_adapter,
        _by_regular_expression,
        _around_the_model,
        _around_the_model_training_the_branches,
        _inside_the_vlm,
        _around_the_vlm,
    ],
)
def test_lora_comes_back(qwen, tmp_path, adapt):
    before = answer(qwen, "qwen2_5_vl")
    adapt(qwen)
    _train_lora(qwen)
    adapted = answer(qwen, "qwen2_5_vl")
    assert adapted.difference(before) > 1e-2
    qwen.save_addon(tmp_path / "addon")
    assert not (tmp_path / "addon" / "adapter_config.json").exists()
    assert all(name.startswith("zoom.") for name in weight_names(tmp_path / "addon"))
    loaded = load(tmp_path / "addon")
    assert loaded.active_adapters() == ["default"]
    assert answer(loaded, "qwen2_5_vl").difference(adapted) < CLOSE
    loaded.save_addon(tmp_path / "again")  # once more, from what was loaded
    assert weights_equal(loaded, load(tmp_path / "again"))
    loaded.merge_lora()
    assert answer(loaded, "qwen2_5_vl").difference(adapted) < 1e-4
    loaded.save_pretrained(tmp_path / "merged")
    assert weights_equal(loaded, load(tmp_path / "merged"))
    with pytest.raises(ValueError, match="weights of this VLM differ"):
        loaded.save_addon(tmp_path / "refused")


@needs_lora
def test_lora_can_be_switched_off(qwen, tmp_path):
    plain = answer(qwen, "qwen2_5_vl")
    qwen.add_adapter(_lora())
    _train_lora(qwen)
    qwen.save_addon(tmp_path / "addon")
    loaded = load(tmp_path / "addon")
    loaded.disable_adapters()
    assert answer(loaded, "qwen2_5_vl").difference(plain) < CLOSE


@needs_lora
def test_lora_keeps_its_own_precision(qwen, tmp_path):
    qwen.add_adapter(_lora())
    _train_lora(qwen)
    qwen.save_addon(tmp_path / "addon")
    low = load(tmp_path / "addon", dtype=torch.bfloat16)
    adapter = {name: part for name, part in low.named_parameters() if "lora_" in name}
    assert adapter and {part.dtype for part in adapter.values()} == {torch.float32}
    assert all(torch.equal(part, qwen.get_parameter(name)) for name, part in adapter.items())
    assert torch.isfinite(answer(low, "qwen2_5_vl").logits).all()
    assert low.get_parameter("zoom.gate.head.weight").requires_grad  # as any loaded weight


@needs_lora
def test_lora_on_an_offloaded_base(qwen, tmp_path):
    qwen.add_adapter(_lora())
    _train_lora(qwen)
    qwen.save_addon(tmp_path / "addon")
    placement = {"device_map": {"vlm": "disk", "zoom": "disk"}, "offload_folder": tmp_path / "off"}
    offloaded = load(tmp_path / "addon", **placement)
    assert answer(offloaded, "qwen2_5_vl").difference(answer(qwen, "qwen2_5_vl")) < CLOSE
    with pytest.raises(ValueError, match="offloaded weights cannot take a LoRA in"):
        offloaded.merge_lora()


@needs_lora
@pytest.mark.parametrize("drop", ["base_model.model.vlm.model.language_model.layers.2.", None])
def test_damaged_lora(qwen, tmp_path, drop):
    qwen.add_adapter(_lora())
    qwen.save_addon(tmp_path / "addon")
    file = tmp_path / "addon" / "lora" / "adapter_model.safetensors"
    file.rename(tmp_path / "addon" / "lora" / "model.safetensors")
    extra = None if drop else {"base_model.model.vlm.nowhere.lora_A.weight": torch.zeros(4, 64)}
    edit_weights(file.parent, drop=drop, add=extra)
    (file.parent / "model.safetensors").rename(file)
    with pytest.raises(ValueError, match="LoRA weights are missing or have no place"):
        load(tmp_path / "addon")


@needs_lora
def test_lora_on_a_4_bit_base(qwen, tmp_path):
    """As in QLoRA: base in 4 bit, adapter and branches not."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    recipe = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["model.visual", "zoom"]
    )
    small = attach(qwen.config.base_model_name_or_path, "qwen2_5_vl", quantization_config=recipe)
    small.add_adapter(_lora())
    _train_lora(small)
    expected = answer(small, "qwen2_5_vl")
    small.save_addon(tmp_path / "addon")
    loaded = load(tmp_path / "addon", quantization_config=recipe)
    assert answer(loaded, "qwen2_5_vl").difference(expected) < CLOSE


def test_dense_addon_on_a_quantized_base(qwen, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    qwen.save_addon(tmp_path / "addon")
    recipe = BitsAndBytesConfig(load_in_4bit=True)
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=recipe)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="quantized weights.*dense base.*quantization_config="):
        load(tmp_path / "addon", base_model_name_or_path=tmp_path / "small")


@needs_lora
def test_lora_folder_of_an_earlier_save_is_ignored(qwen, tmp_path):
    qwen.add_adapter(_lora())
    _train_lora(qwen)
    qwen.save_addon(tmp_path / "addon")
    loaded = load(tmp_path / "addon")
    loaded.merge_lora()
    shutil.copytree(tmp_path / "addon" / "lora", tmp_path / "folder" / "lora")
    loaded.save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder" / "lora").exists()
    assert weights_equal(loaded, load(tmp_path / "folder"))


@needs_lora
def test_lora_needs_peft(qwen, tmp_path, monkeypatch):
    qwen.add_adapter(_lora())
    qwen.save_addon(tmp_path / "addon")
    module = sys.modules["modeling_qzoom.loading_lora_qzoom"]
    monkeypatch.setattr(module, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install peft"):
        load(tmp_path / "addon")


def test_unmerged_lora_and_full_checkpoint(qwen, tmp_path):
    peft.get_peft_model(qwen, _lora())
    with pytest.raises(ValueError, match=r"unmerged LoRA.*save_addon.*merge_lora"):
        qwen.save_pretrained(tmp_path / "full")


@needs_lora
def test_refused_adapters(qwen, tmp_path):
    qwen.add_adapter(_lora())
    qwen.add_adapter(_lora(), adapter_name="second")
    with pytest.raises(ValueError, match=r"several adapters \['default', 'second'\]"):
        qwen.save_addon(tmp_path / "addon")
    qwen.delete_adapter("second")
    qwen.set_adapter("default")
    _train_lora(qwen)
    layer = qwen.get_decoder().layers[0].self_attn.q_proj
    layer.merge()
    with pytest.raises(ValueError, match="differ|is merged"):
        qwen.save_addon(tmp_path / "addon")
    layer.unmerge()


def test_adapter_that_trains_whole_weights_of_the_vlm(qwen, tmp_path):
    peft.get_peft_model(qwen, _lora(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"whole weights of the VLM \(vlm.lm_head.*merge_lora"):
        qwen.save_addon(tmp_path / "addon")


def test_from_backbone_refuses_unmerged_lora(tmp_path):
    vlm = tiny_vlm("qwen2_5_vl")
    peft.get_peft_model(vlm, _lora())
    with pytest.raises(ValueError, match="LoRA adapters.*merge"):
        attach(vlm, "qwen2_5_vl")
