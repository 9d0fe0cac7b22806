"""The memory table: computed bytes equal those of models that are really quantized."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hub_release.measure import memory as memory_table
from hub_release.measure.memory import VARIANTS, main
from hub_release.measure.real_models import load_random, loaded_bytes, measure, question
from hub_release.measure.shapes import cache_bytes, recipes, skeleton, weight_bytes
from hub_release.measure.sizes import MODELS, ModelRow
from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from tests.tiny import vlm_config


bnb = pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
RECIPES = ("bf16", "int8", "nf4", "nf4, double")
QWEN = ("qwen2_5_vl", "qwen3_vl")


def small(family: str, zooms: bool, tied: bool = False):
    """(configuration, class) of a small model; its scales fill no whole number of blocks."""
    config = vlm_config(family)
    config.text_config.intermediate_size = 192
    for part in (config, config.text_config):
        part.tie_word_embeddings = tied
    if not zooms:
        return config, AutoModelForImageTextToText
    return QZoomConfig(vlm_config=config, branch_layer=3, branch_depth=2), QZoomForConditionalGeneration


@pytest.mark.parametrize(("family", "tied"), [("qwen2_5_vl", False), ("qwen3_vl", True)])
@pytest.mark.parametrize("zooms", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_computed_equals_quantized(family, tied, zooms, recipe):
    config, model_class = small(family, zooms, tied)
    chosen = recipes(["model.visual"])[recipe]
    counted = weight_bytes(skeleton(model_class, config, chosen))
    model = load_random(model_class, config, chosen, "cpu")
    assert counted.total == loaded_bytes(model)
    linear = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    packed = [module.weight for module in model.modules() if isinstance(module, linear)]
    assert counted.packed == sum(weight.numel() * weight.element_size() for weight in packed)
    assert bool(packed) == (recipe != "bf16") and (counted.scales > 0) == bool(packed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_taken_are_those_that_loading_takes(variant):
    """Names, not only bytes; here with a skip list that leaves the vision tower to the quantizer too."""
    zooms, skip = VARIANTS[variant]
    config, model_class = small("qwen2_5_vl", zooms)
    recipe = recipes(skip)["nf4"]

    def taken(model):
        return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}

    names = taken(skeleton(model_class, config, recipe))
    assert names == taken(load_random(model_class, config, recipe, "cpu"))
    assert any("visual" in name for name in names) == ("model.visual" not in skip)
    assert not any(name.endswith("lm_head") or "scorer" in name or "gate.head" in name for name in names)
    assert any(name.startswith("zoom.") for name in names) == zooms


def test_cache_bytes():
    """Against a real cache."""
    config, _ = small("qwen2_5_vl", False)
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).eval()
    cache = model(input_ids=torch.arange(9)[None], use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert cache_bytes(config, 9) == held > 0


def test_published_sizes():
    """Parameters of the plain models, as their cards state them (billions)."""
    for name, billions in {"3B": 3.75, "4B": 4.44, "7B": 8.29}.items():
        config, model_class = MODELS[name].config(zooms=False)
        parameters = sum(parameter.numel() for parameter in skeleton(model_class, config, None).parameters())
        assert parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_command(monkeypatch, tmp_path, capsys):
    tiny = ModelRow("Tiny", vlm_config("qwen2_5_vl").to_dict(), branch_layer=3, branch_depth=2)
    monkeypatch.setattr(memory_table, "MODELS", {"3B": tiny})
    assert main(["--models", "3B", "--json", str(tmp_path / "table.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| | bf16 | int8 | nf4 | nf4, double |")
    assert len(lines) == 2 + len(VARIANTS) and all(line.count("|") == lines[0].count("|") for line in lines)
    plain, zoomed, everything = json.loads((tmp_path / "table.json").read_text())
    assert zoomed["bytes"]["bf16"]["computed"] == everything["bytes"]["bf16"]["computed"]
    for name in RECIPES:
        assert plain["bytes"][name]["computed"] < zoomed["bytes"][name]["computed"]
    sizes = [zoomed["bytes"][name]["computed"] for name in RECIPES[:3]]
    assert sizes == sorted(sizes, reverse=True)
    if not torch.cuda.is_available():
        assert main(["--measure"]) == 1
        assert "needs a CUDA device" in capsys.readouterr().err
    assert main(["--tokens", "0"]) == 1
    assert "at least 4, got 0" in capsys.readouterr().err
    monkeypatch.setattr(memory_table, "is_bitsandbytes_available", lambda: False)
    assert main([]) == 1
    assert "qzoom[quantize]" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("zooms", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_measured_on_the_device(family, zooms, recipe):
    """The allocator rounds each tensor up to 512 bytes; nothing else may come on top."""
    config, model_class = small(family, zooms)
    chosen = recipes(["model.visual"])[recipe]
    model = skeleton(model_class, config, chosen)
    counted = weight_bytes(model).total
    found = measure(model_class, config, chosen, tokens=16)
    tensors = 6 * sum(1 for _ in (*model.parameters(), *model.buffers()))
    assert counted <= found["weights"] <= counted + 512 * tensors
    assert found["peak"] > found["weights"] and (found["crop_tokens"] > 0) == zooms


@pytest.mark.gpu
def test_the_question_zooms_within_its_budget():
    config, model_class = small("qwen2_5_vl", True)
    inputs, options = question(config, 16)
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == 16
    model = load_random(model_class, config, None, "cuda")
    report = model.generate(**inputs, **options, max_new_tokens=1).zoom_reports[0]
    assert report.zoomed and 8 <= report.crop_tokens <= 16
