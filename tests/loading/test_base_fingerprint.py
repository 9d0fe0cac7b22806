"""An add-on is put on the base that it was made for, in whatever type and layout that is stored, and on no other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from tests.loading_fixtures import attach, edit_weights, plain_folder, weights_equal
from tests.tiny import FAMILIES, tiny_vlm, vlm_config


load = QZoomForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(family, folder of its base, folder of its add-on)."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    attach(plain_folder(family, folder / "base"), family).save_addon(folder / "addon")
    return family, folder / "base", folder / "addon"


@pytest.fixture
def qwen(tmp_path):
    """(base, add-on) that a test may change."""
    attach(plain_folder("qwen2_5_vl", tmp_path / "base"), "qwen2_5_vl").save_addon(tmp_path / "addon")
    return tmp_path / "base", tmp_path / "addon"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_in_another_type_are_the_same_base(saved, dtype, tmp_path):
    family, base, addon = saved
    low = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    low.save_pretrained(tmp_path / "low")
    low.float().save_pretrained(tmp_path / "back")  # rounded values in the type of the first
    for folder in ("low", "back"):
        load(addon, base_model_name_or_path=tmp_path / folder)
    attach(tmp_path / "low", family).save_addon(tmp_path / "addon")
    for folder in (tmp_path / "back", base):
        load(tmp_path / "addon", base_model_name_or_path=folder)


@pytest.mark.parametrize("layout", ["shards", "nested", "flat"])
def test_other_layouts_are_the_same_base(saved, layout, tmp_path):
    family, _, addon = saved
    options = {"max_shard_size": "200KB"} if layout == "shards" else {"save_original_format": layout == "nested"}
    folder = plain_folder(family, tmp_path / "base", **options)
    loaded = load(addon, base_model_name_or_path=folder)
    assert weights_equal(loaded, load(addon))


def test_placements_and_precisions_of_one_base(saved, tmp_path):
    _, _, addon = saved
    load(addon, device_map={"vlm": "disk", "zoom": "cpu"}, offload_folder=tmp_path)
    load(addon, dtype=torch.float16)


def test_base_that_is_quantized_while_loading(qwen):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    load(qwen[1], quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_addons_without_a_record_still_load(qwen, tmp_path):
    base, addon = qwen
    expected = load(addon)
    edit_weights(addon)  # writes the same weights without it
    assert weights_equal(load(addon), expected)
    tiny_vlm("qwen2_5_vl", seed=3).save_pretrained(tmp_path / "other")
    load(addon, base_model_name_or_path=tmp_path / "other")


def test_record_of_a_later_version_is_passed_over(qwen):
    _, addon = qwen
    for record, message in (('{"version": 99}', None), ("{", "record of its base model is damaged")):
        weights = load_file(addon / "model.safetensors")
        save_file(weights, addon / "model.safetensors", metadata={"format": "pt", "base_fingerprint": record})
        if message is None:
            load(addon)
        else:
            with pytest.raises(ValueError, match=message):
                load(addon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_are_refused_unless_they_are_meant(saved, dtype, tmp_path):
    family, _, addon = saved
    other = tiny_vlm(family, seed=7).to(dtype)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"are not those that this add-on was made for: \d+ of \d+.*check_base=False"):
        load(addon, base_model_name_or_path=tmp_path)
    loaded = load(addon, base_model_name_or_path=tmp_path, check_base=False, dtype=dtype)
    assert weights_equal(loaded.vlm, other)
    with pytest.raises(ValueError, match="made for"):  # the next call asks again
        load(addon, base_model_name_or_path=tmp_path)
    automatic = AutoModelForImageTextToText.from_pretrained(
        addon, base_model_name_or_path=str(tmp_path), check_base=False, dtype=dtype
    )
    assert weights_equal(automatic, loaded)


@pytest.mark.parametrize("original", [True, False])
def test_other_weights_are_noticed_under_other_names(saved, original, tmp_path):
    family, _, addon = saved
    tiny_vlm(family, seed=7).save_pretrained(tmp_path, save_original_format=original)
    with pytest.raises(ValueError, match=r"made for: \d{2,} of \d{2,} tensors differ"):
        load(addon, base_model_name_or_path=tmp_path)


@pytest.mark.parametrize("part", ["q_proj.weight", "layernorm", "mlp.down_proj", "visual"])
def test_light_fine_tuning_is_noticed(qwen, part, tmp_path):
    base, addon = qwen
    tuned = AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if part in name:
                weight.mul_(1.0001)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="are not those that this add-on was made for"):
        load(addon, base_model_name_or_path=tmp_path / "tuned")


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("text_config", "num_hidden_layers", 7, r"text_config.num_hidden_layers 7 instead of 6"),
        ("text_config", "hidden_size", 32, r"text_config.hidden_size 32 instead of 64"),
        ("text_config", "num_attention_heads", 8, r"text_config.num_attention_heads 8 instead of 4"),
        ("text_config", "vocab_size", 384, r"text_config.vocab_size 384 instead of 320"),
        ("vision_config", "depth", 3, r"vision_config.(depth|num_hidden_layers) 3 instead of 2"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_another_shape_is_named(qwen, part, name, value, message, recorded, tmp_path):
    base, addon = qwen
    if not recorded:
        edit_weights(addon)
    other = vlm_config("qwen2_5_vl", layers=value if name == "num_hidden_layers" else 6)
    setattr(getattr(other, part), name, value)
    shutil.copy(base / "model.safetensors", tmp_path / "model.safetensors")
    other.save_pretrained(tmp_path)
    for check in (True, False):
        with pytest.raises(ValueError, match=f"made for another model than .*{message}"):
            load(addon, base_model_name_or_path=tmp_path, check_base=check)


def test_damaged_configuration_of_a_base(qwen):
    base, addon = qwen
    fields = json.loads((base / "config.json").read_text())
    fields["text_config"]["hidden_size"] = "wide"
    (base / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="configuration of the base model .* cannot be read.*hidden_size"):
        load(addon)
    (base / "config.json").unlink()
    load(addon)


def test_another_family_is_named(qwen, tmp_path):
    plain_folder("llava", tmp_path / "llava")
    with pytest.raises(ValueError, match="model_type 'llava' instead of 'qwen2_5_vl'"):
        load(qwen[1], base_model_name_or_path=tmp_path / "llava")


def test_the_record_leaves_the_configuration_alone(qwen):
    fields = json.loads((qwen[1] / "config.json").read_text())
    assert "base_fingerprint" not in fields and "check_base" not in fields
    assert isinstance(QZoomConfig.from_pretrained(qwen[1]), QZoomConfig)
