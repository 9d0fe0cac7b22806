"""4 and 8 bit with bitsandbytes on the CPU: what stays in 16 bit, and saving and loading what was quantized."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from hub_release.build import build
from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.asking.answers import ask
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import Session
from modeling_qzoom.data.drawn.questions import ask_question, draw_page
from tests.loading_fixtures import CLOSE, VISION, answer, attach, weights_equal
from tests.lora_support import needs_lora
from tests.tiny import FAMILIES, Row, make_inputs, tiny_vlm


bnb = pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
load = QZoomForConditionalGeneration.from_pretrained
KEPT = ("zoom.gate.head", "zoom.region.scorer.q_proj", "zoom.region.scorer.k_proj", "vlm.lm_head")
ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def nf4(skip: list[str] | None, **kwargs) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
        **kwargs,
    )


def recipe_of(kind: str, skip: list[str]) -> BitsAndBytesConfig:
    """The recipes of the README: "nf4", "double" or "int8"."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=kind == "double",
        llm_int8_skip_modules=skip,
    )


def quantized_layers(model: nn.Module) -> set[str]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def expect_quantized_decoder_layers(model: nn.Module) -> None:
    """Every linear layer of decoder and branches is quantized, and of `KEPT` nothing is."""
    names = quantized_layers(model)
    for prefix in ("vlm.model.language_model.layers.5", "zoom.gate.layers.1", "zoom.region.layers.0"):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            assert f"{prefix}.{name}" in names
    for name in KEPT:
        assert type(model.get_submodule(name)) is nn.Linear and name not in names


def test_zoomed_answer_in_nf4(full):
    """Equal to the dense model that computes with the same rounded weights, up to the kernel's bf16."""
    family, _, dense, folder = full
    small = load(folder, quantization_config=nf4(VISION[family]))
    expect_quantized_decoder_layers(small)
    rounded = load(folder)
    for name in quantized_layers(small):
        weight = small.get_submodule(name).weight
        rounded.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert not weights_equal(rounded, dense)
    given, expected = answer(small, family), answer(rounded, family)
    assert given.report.zoomed and given.report.reason == "gate_open"
    assert abs(given.report.gate_probability - expected.report.gate_probability) < 0.05
    scale = float(expected.report.region_logits.std())
    assert float((given.report.region_logits - expected.report.region_logits).abs().max()) < 0.2 * scale
    assert given.report.box == expected.report.box
    assert float((given.logits[0] - expected.logits[0]).abs().max()) < 0.2 * float(expected.logits[0].std())


@pytest.mark.parametrize("form", ["none", "list", "dict", "whole_model_names", "double", "8bit"])
def test_what_stays_in_16_bit(qwen_full, form):
    skip = None if form == "none" else ["vlm.model.visual"] if form == "whole_model_names" else ["model.visual"]
    config = nf4(skip, bnb_4bit_use_double_quant=form == "double")
    if form == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    if form == "dict":
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": skip}
    untouched = config if form == "dict" else config.to_dict()
    before = json.dumps(untouched, default=str)
    model = load(qwen_full[1], quantization_config=config)
    expect_quantized_decoder_layers(model)
    dense = load(qwen_full[1])
    assert all(torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight) for name in KEPT)
    assert any("visual" in name for name in quantized_layers(model)) == (form == "none")
    after = config if form == "dict" else config.to_dict()
    assert json.dumps(after, default=str) == before  # the caller's object is left alone


@pytest.mark.parametrize(
    ("family", "kind", "used"),
    [(family, "nf4", True) for family in FAMILIES]
    + [("qwen2_5_vl", "nf4", False), ("qwen2_5_vl", "double", True), ("qwen2_5_vl", "8bit", True)],
)
def test_quantized_save_and_reload(tmp_path, family, kind, used):
    """Also after use: bitsandbytes repacks 4-bit weights at their first use on this CPU."""
    folder = tmp_path / "full"
    attach(tiny_vlm(family), family).save_pretrained(folder)
    recipe = nf4(VISION[family], bnb_4bit_use_double_quant=kind == "double")
    if kind == "8bit":
        recipe = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=VISION[family])
    model = load(folder, quantization_config=recipe)
    expected = answer(model, family) if used else None
    model.save_pretrained(tmp_path / "small")
    expected = expected or answer(model, family)
    loaded = load(tmp_path / "small")
    expect_quantized_decoder_layers(loaded)
    assert answer(loaded, family).difference(expected) < CLOSE
    assert answer(model, family).difference(expected) < CLOSE  # saving has not harmed the model


def test_quantized_folder_with_another_recipe_in_the_call(qwen_full, tmp_path):
    load(qwen_full[1], quantization_config=nf4(["model.visual"])).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = load(tmp_path, quantization_config=nf4(["nothing"]))
    expect_quantized_decoder_layers(loaded)


def test_addon_quantized_while_loading(full, tmp_path):
    family, _, model, folder = full
    model.save_addon(tmp_path / "addon")
    recipe = nf4(VISION[family])
    expected = answer(load(folder, quantization_config=recipe), family)
    loaded = load(tmp_path / "addon", quantization_config=recipe)
    expect_quantized_decoder_layers(loaded)
    assert answer(loaded, family).difference(expected) < CLOSE
    loaded.save_addon(tmp_path / "again")  # dequantized
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config
    assert answer(load(tmp_path / "again", quantization_config=recipe), family).difference(expected) < CLOSE


def test_from_backbone_in_4_bit(full, tmp_path):
    """The branches are dense copies of what the quantized layers compute with."""
    family, base, _, _ = full
    model = attach(base, family, quantization_config=nf4(VISION[family]))
    assert all(name.startswith("vlm.model.language_model.layers") for name in quantized_layers(model))
    assert {parameter.dtype for parameter in model.zoom.parameters()} == {torch.float32}
    expected = answer(model, family)
    model.save_pretrained(tmp_path / "full")
    assert answer(load(tmp_path / "full"), family).difference(expected) < CLOSE
    model.save_addon(tmp_path / "addon")
    recipe = nf4([*VISION[family], "zoom"])
    assert answer(load(tmp_path / "addon", quantization_config=recipe), family).difference(expected) < CLOSE


@pytest.mark.parametrize("used", [False, True])
def test_branches_of_a_4_bit_backbone_equal_its_dequantized_layers(qwen_full, used):
    vlm = AutoModelForImageTextToText.from_pretrained(qwen_full[0], quantization_config=nf4(["model.visual"]))
    if used:
        vlm(input_ids=torch.arange(9)[None])
    model = QZoomForConditionalGeneration.from_backbone(vlm, branch_layer=3, branch_depth=2)
    dense = tiny_vlm("qwen2_5_vl").get_decoder().layers[3].mlp.down_proj.weight
    packed, state = bnb.functional.quantize_4bit(dense, quant_type="nf4")
    expected = bnb.functional.dequantize_4bit(packed, state)
    copy = model.zoom.gate.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(copy, expected, rtol=5e-3 if used else 0, atol=0)  # scales in bf16 after use
    assert torch.corrcoef(torch.stack([copy.flatten(), dense.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("head", ["kept by its base", "quantized in its base"])
@pytest.mark.parametrize("source", ["folder", "object"])
def test_pre_quantized_base(full, tmp_path, head, source):
    family, base, _, _ = full
    skip = [*VISION[family], "lm_head"] if head == "kept by its base" else VISION[family]
    AutoModelForImageTextToText.from_pretrained(base, quantization_config=nf4(skip)).save_pretrained(tmp_path / "base")
    vlm = str(tmp_path / "base")
    model = attach(vlm if source == "folder" else AutoModelForImageTextToText.from_pretrained(vlm), family)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert "quantization_config" not in model.config.vlm_config.to_dict()
    expected = answer(model, family)
    model.save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full")
    assert quantized_layers(loaded) == quantized_layers(model) != set()
    assert answer(loaded, family).difference(expected) < CLOSE
    model.save_addon(tmp_path / "addon")
    again = load(tmp_path / "addon")
    assert quantized_layers(again) == quantized_layers(model)
    assert type(again.get_output_embeddings()) is nn.Linear
    assert answer(again, family).difference(expected) < CLOSE


def test_training_the_branches_on_a_4_bit_backbone(qwen_full):
    model = attach(qwen_full[0], "qwen2_5_vl", quantization_config=nf4(["model.visual"])).train()
    inputs = {"input_ids": torch.arange(12)[None], "gate_targets": torch.tensor([1.0])}
    model(**inputs).loss.backward()
    assert model.zoom.gate.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_bf16_checkpoint_in_nf4_keeps_bf16(qwen_full, tmp_path):
    load(qwen_full[1], dtype=torch.bfloat16).save_pretrained(tmp_path)
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual"],
    )
    model = load(tmp_path, quantization_config=recipe)
    expect_quantized_decoder_layers(model)
    assert {model.get_submodule(name).weight.dtype for name in KEPT} == {torch.bfloat16}
    assert answer(model, "qwen2_5_vl").report.zoomed


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder of the bundled checkpoint, questions, the unquantized model's answers to them)."""
    folder = build(ROOT / "hub_release" / "checkpoints" / "qzoom-demo", tmp_path_factory.mktemp("demo") / "built")
    assets = ROOT / "examples" / "assets"
    bundled = json.loads((assets / "page.json").read_text())
    page = Image.open(assets / bundled["image"])
    rows = [(page, item["question"]) for item in bundled["questions"]]
    for seed in range(5):
        drawn, rng = draw_page(seed, kind="scene", split="test"), random.Random(seed)
        rows += [(drawn.image, ask_question(drawn, kind, rng).text) for kind in ("coarse", "fine")]
    return folder, rows, demo_answers(folder, rows)


def load_demo(folder, **kwargs):
    """As a user of the Hub does."""
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def demo_answers(model, rows) -> list:
    folder = model if isinstance(model, Path) else model.config._name_or_path
    model = load_demo(model) if isinstance(model, Path) else model
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return list(ask(Session(model, processor, ModelConfig(max_new_tokens=16)), rows))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_demo_answers(demo, tmp_path, kind, device):
    """It says mostly what the unquantized model says; quantized once, saved and reloaded, it says the same again."""
    folder, rows, expected = demo
    model = load_demo(folder, quantization_config=recipe_of(kind, ["model.visual"]), device_map={"": device})
    given = demo_answers(model, rows)
    names = quantized_layers(model)
    assert "zoom.region.layers.0.mlp.up_proj" in names and not any("visual" in name for name in names)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in KEPT)
    for reply, reference in zip(given, expected, strict=True):
        assert reply.text
        report = reply.report
        assert report.coarse_tokens == reference.report.coarse_tokens > 0
        assert 0 <= report.gate_probability <= 1 and report.zoomed == (report.box is not None)
    same = [reply.text == reference.text for reply, reference in zip(given, expected)]
    decided = [reply.report.reason == reference.report.reason for reply, reference in zip(given, expected)]
    assert sum(same) > len(rows) / 2 and sum(decided) > len(rows) / 2
    model.save_pretrained(tmp_path)
    loaded = load_demo(tmp_path, device_map={"": device})
    assert quantized_layers(loaded) == names
    loaded.config._name_or_path = str(folder)  # the processor's
    again = demo_answers(loaded, rows)
    assert [reply.text for reply in again] == [reply.text for reply in given]
    assert [reply.report.box for reply in again] == [reply.report.box for reply in given]


@needs_lora
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_training_a_lora_on_a_quantized_base(qwen_full, tmp_path, kind, device):
    """A few steps over the fused sequence move the adapter only, and an add-on brings it back."""
    import peft

    base, folder = qwen_full
    recipe = recipe_of(kind, ["model.visual"])
    model = load(folder, quantization_config=recipe, device_map={"": device}, base_model_name_or_path=base)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=r"vlm\..*language_model.*\.(q_proj|v_proj)"))
    model.train()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name and name.startswith("vlm.") for name in trained)
    inputs = make_inputs("qwen2_5_vl", [Row(["look ", None, " what? 42"], [(3, 4)], 1)])
    inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs, labels=labels, zoom_boxes=[(0, 0, 60, 60)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_addon(tmp_path / "addon")
    loaded = load(tmp_path / "addon", quantization_config=recipe, device_map={"": device})
    kept = {name: weight for name, weight in loaded.named_parameters() if "lora_" in name}
    assert kept.keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in kept.items())
