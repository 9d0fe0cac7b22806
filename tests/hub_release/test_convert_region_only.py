"""The converter on SD-RPN checkpoints: a region branch without a gate, and files that end above it."""

import pytest
import torch
from transformers import CLIPImageProcessor, LlavaProcessor

from hub_release.convert_official import convert
from hub_release.official.format import ConversionError
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from tests.official_fixtures import assert_same_weights, flat_llava_config, official_weights, write_folder
from tests.processing_fixtures import LLAVA_ARGUMENTS, chat, noise, process
from tests.tiny import llava_tokenizer, tiny_model


def test_without_a_gate(tmp_path):
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


def test_a_family_without_published_thresholds_borrows_them(tmp_path):
    source = write_folder(tmp_path / "source", tiny_model("qwen3_vl", has_gate=False), "nested")
    converted = convert(source, tmp_path / "output")
    assert converted.zoom.gate is None
    assert converted.config.presets["accurate"]["region_threshold"] == 0.10


def test_a_gate_that_the_config_switches_off_is_ignored(tmp_path):
    source = write_folder(tmp_path / "source", tiny_model("qwen2_5_vl"), enable_high_res=False)
    assert convert(source, tmp_path / "output").zoom.gate is None


def test_pruned_outputs_need_the_base(tmp_path):
    """Training outputs end above the branch; layers, norm and head come from the plain VLM."""
    model = tiny_model("qwen2_5_vl", has_gate=False, layers=7)
    drop = r"^model\.layers\.[56]\.|^model\.norm|^lm_head"
    source = write_folder(tmp_path / "source", model, drop=drop)
    with pytest.raises(ConversionError, match="--base"):
        convert(source, tmp_path / "output")
    model.vlm.save_pretrained(tmp_path / "base")
    assert_same_weights(convert(source, tmp_path / "output", tmp_path / "base"), model)


def test_the_checkpoint_wins_over_the_base(tmp_path):
    model, other = tiny_model("qwen2_5_vl", has_gate=False), tiny_model("qwen2_5_vl", seed=5)
    source = write_folder(tmp_path / "source", model)
    other.vlm.save_pretrained(tmp_path / "base")
    assert_same_weights(convert(source, tmp_path / "output", tmp_path / "base"), model)


def test_flat_llava(tmp_path):
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


def test_the_image_token_gets_a_row(tmp_path):
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
