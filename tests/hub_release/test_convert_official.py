"""The converter on folders as the authors' code and transformers of that time write them, from tiny random models."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessor

from hub_release.convert_official import convert, main
from hub_release.official.format import ConversionError
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from tests.families import FAMILY
from tests.official_fixtures import DEPTH, assert_same_weights, shard, write_folder
from tests.processing_fixtures import chat, noise, process
from tests.tiny import EVERY_TOKEN, Row, make_inputs, qwen_tokenizer, tiny_model, vlm_config


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
    model = QZoomForConditionalGeneration.from_backbone(
        vlm, branch_layer=3, branch_depth=DEPTH, zoom_config={**budget, **EVERY_TOKEN}
    )
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


def test_shards(tmp_path):
    model = tiny_model("qwen2_5_vl")
    source = write_folder(tmp_path / "source", model)
    names = shard(source)
    assert_same_weights(convert(source, tmp_path / "output"), model)
    (source / names[1]).unlink()
    with pytest.raises(ConversionError, match=names[1]):
        convert(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


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


def test_command_line(tmp_path, capsys):
    source = write_folder(tmp_path / "source", tiny_model("qwen2_5_vl"))
    assert main([str(source), str(tmp_path / "output")]) == 0
    assert "K=3, T=2, gate: yes, positions: continuous, coarse view: 4-24 tokens" in capsys.readouterr().out
    assert main([str(source), str(tmp_path / "output")]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(source), str(tmp_path / "empty")]) == 0


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
