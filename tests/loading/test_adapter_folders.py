"""Folders that hold an adapter of peft only: its base is loaded too, as by every class of transformers."""

import json

import peft
import pytest
from transformers import AutoModelForImageTextToText

from modeling_qzoom import QZoomForConditionalGeneration
from tests.loading_fixtures import attach, plain_folder, weights_equal
from tests.lora_support import needs_lora
from tests.tiny import FAMILIES, tiny_vlm


load = QZoomForConditionalGeneration.from_pretrained
pytestmark = [
    needs_lora,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def _lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["k_proj", "down_proj"], init_lora_weights=False)


@pytest.mark.parametrize("base", ["full", "addon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapter_are_loaded(family, base, tmp_path):
    model = attach(plain_folder(family, tmp_path / "plain"), family)
    (model.save_addon if base == "addon" else model.save_pretrained)(tmp_path / "base")
    adapted = load(tmp_path / "base")
    adapted.add_adapter(_lora())
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded, info = load(tmp_path / "adapter", output_loading_info=True)
    assert weights_equal(loaded, adapted) and not info["missing_keys"]
    assert weights_equal(AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter"), adapted)


def test_adapter_of_a_plain_model(tmp_path):
    tiny_vlm("qwen3_vl").save_pretrained(tmp_path / "base")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    plain.add_adapter(_lora())
    plain.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="base of the adapter in .* holds a plain 'qwen3_vl' model.*from_backbone"):
        load(tmp_path / "adapter")


def test_adapter_on_an_addon_that_has_one(tmp_path):
    model = attach(plain_folder("qwen2_5_vl", tmp_path / "plain"), "qwen2_5_vl")
    model.add_adapter(_lora())
    model.save_addon(tmp_path / "base")
    fields = json.loads((tmp_path / "base" / "lora" / "adapter_config.json").read_text())
    (tmp_path / "adapter").mkdir()
    fields["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    weights = tmp_path / "base" / "lora" / "adapter_model.safetensors"
    (tmp_path / "adapter" / weights.name).write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match="belongs to an add-on that has a LoRA adapter of its own"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json"),
        ("{", "adapter_config.json cannot be read"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "names no base model"),
    ],
)
def test_folders_from_which_nothing_can_be_loaded(content, message, tmp_path):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_full_checkpoint_is_not_saved_beside_an_adapter(tmp_path):
    """Loading would put the adapter around the merged weights once more."""
    model = attach(tiny_vlm("llava"), "llava")
    model.save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    model.add_adapter(_lora())
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")  # once more over itself
    model.merge_lora()
    with pytest.raises(ValueError, match="holds a LoRA adapter, which a full Q-Zoom checkpoint would overwrite"):
        model.save_pretrained(tmp_path / "adapter")
