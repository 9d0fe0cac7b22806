"""The converter on folders as the authors' code and transformers of that time write them, from tiny random models."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor, Qwen2VLImageProcessor

from hub_release.convert_official import convert, main
from hub_release.official.format import ConversionError
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from tests.families import FAMILY
from tests.processing_fixtures import LLAVA_ARGUMENTS, chat, noise, process
from tests.tiny import Row, llava_tokenizer, make_inputs, qwen_tokenizer, tiny_model, vlm_config


DEPTH = 2
# how files of each kind spell transformers' names: (branch prefix, substitutions)
NAMINGS = {
    "flat": ("model.", [("^model.visual", "visual"), ("^model.language_model", "model")]),
    "nested": ("model.language_model.", []),
    "inner": ("language_model.", [("^model.visual", "visual"), ("^model.language_model", "language_model")]),
    "llava_original": (
        "model.",
        [
            (r"^model.vision_tower", "model.vision_tower.vision_tower.vision_model"),
            (r"^model.multi_modal_projector.linear_1", "model.mm_projector.0"),
            (r"^model.multi_modal_projector.linear_2", "model.mm_projector.2"),
            (r"^model.language_model", "model"),
        ],
    ),
    "llava_transformers": (
        "language_model.model.",
        [
            (r"^model.vision_tower", "vision_tower.vision_model"),
            (r"^model.multi_modal_projector", "multi_modal_projector"),
            (r"^model.language_model", "language_model.model"),
            (r"^lm_head", "language_model.lm_head"),
        ],
    ),
}


def official_weights(model, naming: str) -> dict[str, torch.Tensor]:
    """The model's weights under the authors' names, with those that their code stores without using them."""
    prefix, substitutions = NAMINGS[naming]
    weights = {}
    for name, tensor in model.vlm.state_dict().items():
        for pattern, replacement in substitutions:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    for name, tensor in model.zoom.state_dict().items():
        branch, rest = name.split(".", 1)
        if rest.startswith("scorer."):
            inner = rest.removeprefix("scorer.")
            inner = inner if "layernorm" in inner else f"self_attn.{inner}"
            rest = f"layers.{DEPTH - 1}.{inner}"
        weights[f"{prefix}{'high_res' if branch == 'gate' else 'twig'}_{rest}"] = tensor
    weights[f"{prefix}twig_layers.{DEPTH - 1}.mlp.up_proj.weight"] = torch.zeros(128, 64)
    weights[f"{prefix}twig_layers.{DEPTH - 1}.self_attn.o_proj.weight"] = torch.zeros(64, 64)
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def write_folder(
    folder: Path, model, naming: str = "flat", *, drop: str | None = None, extra=None, config=None, **settings
) -> Path:
    """A folder in the authors' format.

    Args:
        drop: pattern of weights to leave out.
        extra: further weights.
        config: replaces the VLM's configuration.
        settings: further keys of config.json; None removes one.
    """
    folder.mkdir(parents=True)
    weights = official_weights(model, naming) | (extra or {})
    weights = {name: tensor for name, tensor in weights.items() if not (drop and re.search(drop, name))}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fields = config if config is not None else model.config.vlm_config.to_dict()
    fields |= {"twig_K": model.config.branch_layer, "twig_T": DEPTH, "enable_twig": True, "roi_loss": "bce"}
    fields |= {"enable_high_res": True} if model.config.has_gate else {}
    fields |= {"reuse_src_pos": True, "min_pixels": 4 * 28**2, "max_pixels": 24 * 28**2, "torch_dtype": "float32"}
    fields = {key: value for key, value in (fields | settings).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def flat_llava_config(model) -> dict:
    """LLaVA-1.5's original configuration."""
    config = model.config.vlm_config
    text = {key: value for key, value in config.text_config.to_dict().items() if key != "model_type"}
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2}
    return {**text, **tower, "model_type": "llava_llama", "image_aspect_ratio": "pad"}


def assert_same_weights(converted, model, *, rows: int | None = None) -> None:
    """Every weight of `model` is in `converted`; `rows` of the vocabulary count."""
    ours, theirs = converted.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        ours_here = ours[name][:rows] if "embed_tokens" in name or "lm_head" in name else ours[name]
        assert torch.equal(ours_here, tensor), name


@pytest.mark.parametrize(
    ("family", "naming"),
    [
        *((family, naming) for family in ("qwen2_5_vl", "qwen3_vl") for naming in ("flat", "nested", "inner")),
        ("llava", "llava_original"),
        ("llava", "llava_transformers"),
    ],
)
def test_every_naming_converts(family, naming, tmp_path):
    """What is written loads as what was converted; leftovers of the authors' training are ignored."""
    model = tiny_model(family, has_gate=FAMILY[family].has_official_gate)
    extra = {"twig_head.weight": torch.zeros(320, 64)}
    if FAMILY[family].has_budget:
        extra["model.twig_norm.weight"] = torch.zeros(64)
    source = write_folder(tmp_path / "source", model, naming, extra=extra)
    convert(source, tmp_path / "output")
    loaded = QZoomForConditionalGeneration.from_pretrained(tmp_path / "output")
    assert_same_weights(loaded, model)
    config = loaded.config
    assert (config.branch_layer, config.branch_depth, config.has_gate) == (3, DEPTH, FAMILY[family].has_official_gate)
    assert config.position_alignment == ("continuous" if FAMILY[family].spec.mrope else None)
    assert loaded.dtype == torch.float32
    assert not hasattr(config.vlm_config, "twig_K")


def test_converted_model_answers_as_the_original(tmp_path):
    """The tied head, absent from such files or written out, is the embedding."""
    config = vlm_config("qwen2_5_vl")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(config).eval()
    budget = {"min_tokens": 4, "max_tokens": 24}
    model = QZoomForConditionalGeneration.from_backbone(vlm, branch_layer=3, branch_depth=DEPTH, zoom_config=budget)
    inputs = make_inputs("qwen2_5_vl", [Row(["look", None, "what?"], [(4, 5)])])
    options = {"zoom": "always", "region_threshold": 0.0, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    for name, drop in (("absent", "^lm_head"), ("present", None)):
        source = write_folder(tmp_path / name, model, "nested", drop=drop)
        converted = convert(source, tmp_path / f"{name}_output")
        assert converted.get_output_embeddings().weight is converted.get_input_embeddings().weight
        assert torch.equal(converted.generate(**inputs, **options), expected)


def test_tie_may_be_written_in_the_text_config_alone(tmp_path):
    model = tiny_model("qwen3_vl")
    config = model.config.vlm_config.to_dict()
    config.pop("tie_word_embeddings")
    config["text_config"]["tie_word_embeddings"] = True
    source = write_folder(tmp_path / "source", model, "nested", drop="^lm_head", config=config)
    converted = convert(source, tmp_path / "output")
    assert converted.get_output_embeddings().weight is converted.get_input_embeddings().weight


def shard(folder: Path) -> list[str]:
    """Splits the folder's weights into three files with an index; returns their names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{part + 1}-of-00003.safetensors" for part in range(3)]
    keys = sorted(weights)
    weight_map = {key: names[index % 3] for index, key in enumerate(keys)}
    for part, name in enumerate(names):
        save_file({key: weights[key] for key in keys[part::3]}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_shards(tmp_path):
    model = tiny_model("qwen2_5_vl")
    source = write_folder(tmp_path / "source", model)
    names = shard(source)
    assert_same_weights(convert(source, tmp_path / "output"), model)
    (source / names[1]).unlink()
    with pytest.raises(ConversionError, match=names[1]):
        convert(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_damaged_files_are_named(tmp_path):
    source = write_folder(tmp_path / "source", tiny_model("qwen2_5_vl"))
    whole = (source / "config.json").read_bytes()
    names = shard(source)
    (source / "config.json").write_text('{"twig_K": ')
    with pytest.raises(ConversionError, match="config.json cannot be read"):
        convert(source, tmp_path / "output")
    (source / "config.json").write_bytes(whole)
    os.truncate(source / names[1], 200)
    with pytest.raises(ConversionError, match=f"{names[1]} cannot be read: it is cut short"):
        convert(source, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_settings_come_from_the_files(tmp_path):
    """The top level wins over text_config; alignment, budgets, statistics and dtype are the checkpoint's own."""
    model = tiny_model("qwen3_vl")
    config = model.config.vlm_config.to_dict()
    config["text_config"] |= {"twig_K": 99, "high_res_K": 3, "high_res_T": DEPTH, "roi_post_training": False}
    source = write_folder(
        tmp_path / "source", model.bfloat16(), config=config, reuse_src_pos=False, min_pixels=None, max_pixels=None
    )
    preprocessor = {"size": {"shortest_edge": 7 * 32**2 - 5, "longest_edge": 9 * 32**2 + 5}, "image_mean": [0.1] * 3}
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"image_std": [0.2] * 3}))
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    convert(source, tmp_path / "output")
    loaded = QZoomForConditionalGeneration.from_pretrained(tmp_path / "output")
    assert (loaded.config.branch_layer, loaded.config.position_alignment) == (3, "sequential")
    assert (loaded.config.min_tokens, loaded.config.max_tokens) == (7, 9)
    assert (loaded.config.image_mean, loaded.config.image_std) == ([0.1] * 3, [0.2] * 3)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.temperature == 0.5


@pytest.mark.parametrize(("family", "mean"), [("qwen2_5_vl", 0.48145466), ("qwen3_vl", 0.5)])
def test_statistics_without_preprocessor_are_the_familys(family, mean, tmp_path):
    source = write_folder(tmp_path / "source", tiny_model(family))
    assert convert(source, tmp_path / "output").config.image_mean[0] == mean


def test_published_presets_apply(tmp_path):
    source = write_folder(tmp_path / "source", tiny_model("qwen3_vl"))
    model = convert(source, tmp_path / "output")
    assert set(model.config.presets) == {"fast", "balanced", "accurate"}
    assert (model.config.region_threshold, model.config.gate_threshold) == (0.125, 0.10)
    inputs = make_inputs("qwen3_vl", [Row([None, "what?"], [(4, 5)])])
    report = model.generate(
        **inputs, zoom="always", effort="fast", region_threshold=0.0, return_zoom_reports=True, max_new_tokens=1
    ).zoom_reports[0]
    assert 256 <= report.crop_tokens <= 576


class TestSDRPN:
    """Region branch only."""

    def test_without_a_gate(self, tmp_path):
        model = tiny_model("qwen2_5_vl", has_gate=False)
        source = write_folder(tmp_path / "source", model, reuse_src_pos=None)
        converted = convert(source, tmp_path / "output")
        assert converted.zoom.gate is None
        assert converted.config.position_alignment == "sequential"
        assert converted.config.presets["fast"] == {
            "region_threshold": 0.1,
            "crop_min_tokens": 576,
            "crop_max_tokens": 576,
        }

    def test_a_family_without_published_thresholds_borrows_them(self, tmp_path):
        source = write_folder(tmp_path / "source", tiny_model("qwen3_vl", has_gate=False), "nested")
        converted = convert(source, tmp_path / "output")
        assert converted.zoom.gate is None
        assert converted.config.presets["accurate"]["region_threshold"] == 0.10

    def test_a_gate_that_the_config_switches_off_is_ignored(self, tmp_path):
        source = write_folder(tmp_path / "source", tiny_model("qwen2_5_vl"), enable_high_res=False)
        assert convert(source, tmp_path / "output").zoom.gate is None

    def test_pruned_outputs_need_the_base(self, tmp_path):
        """Training outputs end above the branch; layers, norm and head come from the plain VLM."""
        model = tiny_model("qwen2_5_vl", has_gate=False, layers=7)
        drop = r"^model\.layers\.[56]\.|^model\.norm|^lm_head"
        source = write_folder(tmp_path / "source", model, drop=drop)
        with pytest.raises(ConversionError, match="--base"):
            convert(source, tmp_path / "output")
        model.vlm.save_pretrained(tmp_path / "base")
        assert_same_weights(convert(source, tmp_path / "output", tmp_path / "base"), model)

    def test_the_checkpoint_wins_over_the_base(self, tmp_path):
        model, other = tiny_model("qwen2_5_vl", has_gate=False), tiny_model("qwen2_5_vl", seed=5)
        source = write_folder(tmp_path / "source", model)
        other.vlm.save_pretrained(tmp_path / "base")
        assert_same_weights(convert(source, tmp_path / "output", tmp_path / "base"), model)

    def test_flat_llava(self, tmp_path):
        """Vision tower, head, image settings and tokenizer come from transformers' LLaVA, the vocabulary grows."""
        model = tiny_model("llava", has_gate=False)
        model.vlm.save_pretrained(tmp_path / "base")
        images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        LlavaProcessor(images, llava_tokenizer(), **LLAVA_ARGUMENTS).save_pretrained(tmp_path / "base")
        image_token = model.config.image_token_id
        weights = official_weights(model, "llava_original")
        short = {name: weights[name][:image_token].clone() for name in ("model.embed_tokens.weight",)}
        source = write_folder(
            tmp_path / "source",
            model,
            "llava_original",
            drop=r"layers\.5\.|^model\.norm|^lm_head|vision_tower",
            extra=short,
            config=flat_llava_config(model),
        )
        converted = convert(source, tmp_path / "output", tmp_path / "base")
        assert_same_weights(converted.zoom, model.zoom)
        embedding = converted.get_input_embeddings().weight
        assert embedding.shape[0] == converted.config.get_text_config().vocab_size == 320
        assert torch.equal(embedding[:image_token], model.get_input_embeddings().weight[:image_token])
        processor = QZoomProcessor.from_pretrained(tmp_path / "output")
        loaded = QZoomForConditionalGeneration.from_pretrained(tmp_path / "output")
        inputs = process(processor, chat(noise(90, 60), "what?"))
        out = loaded.generate(**inputs, region_threshold=0.0, return_zoom_reports=True, max_new_tokens=2)
        assert out.zoom_reports[0].zoomed

    def test_the_image_token_gets_a_row(self, tmp_path):
        """Without a base the original vocabulary ends before the image token; new rows never win."""
        model = tiny_model("llava", has_gate=False)
        config = flat_llava_config(model) | {"vision_config": model.config.vision_config.to_dict()}
        source = write_folder(tmp_path / "source", model, "llava_original", config=config)
        converted = convert(source, tmp_path / "output")
        rows = converted.get_output_embeddings().weight
        assert len(rows) > converted.config.image_token_id == 32000
        assert_same_weights(converted, model, rows=320)
        logits = rows @ torch.randn(64, generator=torch.Generator().manual_seed(0))
        assert logits[320:].max() < logits[:320].max()


class TestProcessor:
    @pytest.fixture
    def source(self, tmp_path):
        source = write_folder(tmp_path / "source", tiny_model("qwen2_5_vl"))
        qwen_tokenizer().save_pretrained(source)
        return source

    def test_tokenizer_and_image_settings_make_a_processor(self, source, tmp_path):
        Qwen2VLImageProcessor(patch_size=14, merge_size=2).save_pretrained(source)
        model = convert(source, tmp_path / "output")
        processor = QZoomProcessor.from_pretrained(tmp_path / "output")
        inputs = process(processor, chat(noise(300, 200), "what?"))
        assert 4 <= int(inputs["image_grid_thw"].prod()) // 4 <= 24
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2

    def test_a_tokenizer_alone_is_copied(self, source, tmp_path, capsys):
        assert main([str(source), str(tmp_path / "output")]) == 0
        assert "no processor" in capsys.readouterr().out
        assert (tmp_path / "output" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


class TestErrors:
    """Each names its cause; nothing is written."""

    @pytest.fixture
    def model(self):
        return tiny_model("qwen2_5_vl")

    def check(self, source, tmp_path, match):
        with pytest.raises(ConversionError, match=match):
            convert(source, tmp_path / "output")
        assert not (tmp_path / "output").exists()

    def test_command_line(self, model, tmp_path, capsys):
        source = write_folder(tmp_path / "source", model)
        assert main([str(source), str(tmp_path / "output")]) == 0
        assert "K=3, T=2, gate: yes, positions: continuous, coarse view: 4-24 tokens" in capsys.readouterr().out
        assert main([str(source), str(tmp_path / "output")]) == 1
        assert "not an empty folder" in capsys.readouterr().err
        (tmp_path / "empty").mkdir()
        assert main([str(source), str(tmp_path / "empty")]) == 0

    @pytest.mark.parametrize(
        "name",
        [
            "twig_layers.0.mlp.up_proj.weight",
            "twig_layers.1.self_attn.q_proj.weight",
            "high_res_layers.1.input_layernorm.weight",
            "high_res_head.bias",
        ],
    )
    def test_a_missing_branch_weight_is_named(self, model, tmp_path, name):
        source = write_folder(tmp_path / "source", model, drop=rf"^model\.{re.escape(name)}$")
        self.check(source, tmp_path, rf"lacks branch weights: \['{re.escape(name)}'\] \(1 in all\)")

    def test_a_branch_layer_too_many(self, model, tmp_path):
        extra = {"model.twig_layers.2.mlp.up_proj.weight": torch.zeros(128, 64)}
        source = write_folder(tmp_path / "source", model, extra=extra)
        self.check(source, tmp_path, r"belong to no layer: \['twig_layers.2.mlp")

    def test_a_missing_vlm_weight_is_named(self, model, tmp_path):
        source = write_folder(tmp_path / "source", model, drop=r"layers\.4\.mlp\.down_proj")
        self.check(source, tmp_path, r"model.language_model.layers.4.mlp.down_proj.weight'\] \(1 in all\).*--base")

    def test_a_weight_of_the_wrong_shape(self, model, tmp_path):
        source = write_folder(tmp_path / "source", model, extra={"model.high_res_head.weight": torch.zeros(1, 32)})
        self.check(source, tmp_path, "source")

    def test_only_pickled_weights(self, model, tmp_path):
        source = write_folder(tmp_path / "source", model)
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        self.check(source, tmp_path, "convert them to safetensors")

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"twig_K": None}, "not a Q-Zoom or SD-RPN checkpoint"),
            ({"model_type": "gpt2"}, "gpt2"),
            ({"high_res_K": 2}, "different layers|read different"),
            ({"twig_K": 6}, "exceeds the VLM's 6 decoder layers"),
        ],
    )
    def test_configurations(self, model, tmp_path, settings, match):
        self.check(write_folder(tmp_path / "source", model, **settings), tmp_path, match)

    def test_no_folder(self, tmp_path):
        self.check(tmp_path / "nowhere", tmp_path, "is not a folder")

    def test_no_config(self, model, tmp_path):
        source = write_folder(tmp_path / "source", model)
        (source / "config.json").unlink()
        self.check(source, tmp_path, "holds no config.json")
