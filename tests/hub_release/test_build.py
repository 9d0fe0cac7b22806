"""Repositories in every form: split weights, add-ons, 4 bit, and a tokenizer from elsewhere."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, LlavaProcessor

from hub_release.build import build, left_out, main
from hub_release.checks.folder import check_folder
from hub_release.repository.errors import BuildError
from hub_release.repository.files import files_of
from hub_release.repository.tensors import stored_tensors, variant_of
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from tests.loading_fixtures import CLOSE, answer, attach, plain_folder, weights_equal
from tests.processing_fixtures import LLAVA_ARGUMENTS, chat, noise, process
from tests.release_fixtures import DEMO, converted_golden, data_folder, golden_tokenizer
from tests.tiny import llava_tokenizer, qwen_tokenizer, tiny_model


load = QZoomForConditionalGeneration.from_pretrained
LICENCE = {"licence": "apache-2.0"}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def nothing_wrong(folder) -> bool:
    return not any(check_folder(folder).values())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(folder with a plain VLM and its licence, data of a full checkpoint on it)."""
    folder = tmp_path_factory.mktemp("qwen")
    base = plain_folder("qwen2_5_vl", folder / "base")
    (folder / "base" / "LICENSE").write_text("terms of the base")
    data = data_folder("qwen2_5_vl", folder / "data")
    attach(base, "qwen2_5_vl").save_pretrained(data)
    return folder / "base", data


def test_only_what_belongs_there_is_copied(qwen, tmp_path, capsys):
    data = shutil.copytree(qwen[1], tmp_path / "data")
    (data / "optimizer.pt").write_bytes(b"")
    (data / "checkpoint-5").mkdir()
    (data / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (data / "assets").mkdir()
    (data / "assets" / "page.png").write_bytes(b"a picture")
    (data / "LICENSE").write_text("the weights' own terms")
    assert left_out(data) == ["checkpoint-5/trainer_state.json", "optimizer.pt"]
    assert main([str(data), str(tmp_path / "out"), "--license", "mit", "--base", "someone/base"]) == 0
    assert "left out, as no part of a repository: checkpoint-5/trainer_state.json" in capsys.readouterr().out
    assert nothing_wrong(tmp_path / "out")
    names = files_of(tmp_path / "out")
    assert "assets/page.png" in names and "optimizer.pt" not in names
    assert (tmp_path / "out" / "BASE_LICENSE").read_text() == "the weights' own terms"
    assert (tmp_path / "out" / "LICENSE").read_bytes() != (tmp_path / "out" / "BASE_LICENSE").read_bytes()


def test_building_a_built_folder_changes_nothing(qwen, tmp_path):
    options = {"base": "someone/base", "base_folder": qwen[0], **LICENCE}
    first = build(qwen[1], tmp_path / "1" / "same", **options)
    second = build(first, tmp_path / "2" / "same")
    assert files_of(first) == files_of(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files_of(first))


def test_a_revision_belongs_to_its_name(qwen, tmp_path):
    data = shutil.copytree(qwen[1], tmp_path / "data")
    config = config_of(data) | {"base_model_name_or_path": "someone/base", "base_model_revision": "abc"}
    (data / "config.json").write_text(json.dumps(config))
    assert config_of(build(data, tmp_path / "a", base="someone/base"))["base_model_revision"] == "abc"
    assert config_of(build(data, tmp_path / "b", base="another/base"))["base_model_revision"] is None


def test_shards(qwen, tmp_path):
    output = build(
        qwen[1], tmp_path / "out", max_shard_size="400KB", base="someone/base", base_folder=qwen[0], **LICENCE
    )
    assert len({tensor.file for tensor in stored_tensors(output).values()}) > 1
    assert not (output / "model.safetensors").exists()
    assert nothing_wrong(output)
    assert weights_equal(load(output), load(qwen[1]))
    assert "safetensors files" in (output / "README.md").read_text()


def test_addon(qwen, tmp_path):
    """Its users are told where the base is; here it is somewhere else."""
    base, data = qwen
    output = build(data, tmp_path / "out", variant="addon", base="someone/base", base_folder=base, **LICENCE)
    config = config_of(output)
    assert variant_of(config, stored_tensors(output)) == "addon"
    assert config["base_model_name_or_path"] == "someone/base"
    assert nothing_wrong(output)
    assert weights_equal(load(output, base_model_name_or_path=base), load(data))
    assert (output / "BASE_LICENSE").read_text() == "terms of the base"
    whole = build(output, tmp_path / "whole", base_folder=base, max_shard_size="5GB")  # and back
    assert weights_equal(load(whole), load(data)) and nothing_wrong(whole)


def test_four_bit(tmp_path):
    """Quantized once: what is loaded, and what is saved again from it, are the same bits; the vision side is dense."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    output = build(DEMO, tmp_path / "out", variant="4bit")
    assert nothing_wrong(output)
    recipe = config_of(output)["quantization_config"]
    assert recipe["bnb_4bit_quant_type"] == "nf4" and recipe["bnb_4bit_use_double_quant"]
    assert not any("visual" in name for name in stored_tensors(output) if ".absmax" in name)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (output, DEMO)]
    assert sizes[0] < 0.6 * sizes[1]
    small = load(output)
    small.save_pretrained(tmp_path / "again")
    left, right = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "again"))
    assert left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)
    with pytest.raises(BuildError, match="is quantized; build --variant addon from the checkpoint in 16 bit"):
        build(output, tmp_path / "addon", variant="addon")


def test_variant_refusals(qwen, tmp_path):
    base, data = qwen
    (tmp_path / "data").mkdir()
    scratch = shutil.copytree(data, tmp_path / "data", dirs_exist_ok=True)
    (scratch / "config.json").write_text(json.dumps(config_of(data) | {"base_model_name_or_path": None}))
    with pytest.raises(BuildError, match="no base model is known"):
        build(scratch, tmp_path / "out", variant="addon")
    other = tiny_model("qwen2_5_vl", seed=5).vlm
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BuildError, match="weights of this VLM differ"):
        build(scratch, tmp_path / "out", variant="addon", base_folder=tmp_path / "other")
    with pytest.raises(BuildError, match="--base-folder .*nowhere is not a folder"):
        build(scratch, tmp_path / "out", base_folder=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other"]  # no scratch folder is left


@pytest.mark.parametrize("case", ["qwen2_5_vl_a", "qwen3_vl_b"])
def test_tokenizer_for_a_converted_checkpoint(case, tmp_path):
    converted = converted_golden(case, tmp_path)
    output = build(converted, tmp_path / "out", tokenizer=golden_tokenizer(tmp_path / "tokenizer"), **LICENCE)
    assert nothing_wrong(output)
    model, processor = load(output), QZoomProcessor.from_pretrained(output)
    assert (processor.min_tokens, processor.max_tokens) == (model.config.min_tokens, model.config.max_tokens)
    assert list(processor.image_processor.image_mean) == model.config.image_mean
    inputs = process(processor, chat(noise(300, 200), "what?"))
    out = model.generate(**inputs, zoom="always", region_threshold=0.0, max_new_tokens=2, return_zoom_reports=True)
    assert out.zoom_reports[0].zoomed


def test_tokenizer_of_a_fixed_grid(tmp_path):
    """LLaVA's image settings are in no checkpoint; the plain VLM's folder has them."""
    data = data_folder("llava", tmp_path / "data")
    expected = answer(load(data), "llava")
    for pattern in ("tokenizer*", "chat_template*", "processor_config.json"):
        for path in data.glob(pattern):
            path.unlink()
    llava_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(BuildError, match="let --tokenizer name the plain VLM's folder"):
        build(data, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    LlavaProcessor(images, llava_tokenizer(), **LLAVA_ARGUMENTS).save_pretrained(tmp_path / "plain")
    output = build(data, tmp_path / "out", tokenizer=tmp_path / "plain", **LICENCE)
    assert nothing_wrong(output)
    assert answer(load(output), "llava").difference(expected) < CLOSE


def test_tokenizer_refusals(qwen, tmp_path):
    tokenizer = golden_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(BuildError, match="has a processor and a tokenizer of its own"):
        build(qwen[1], tmp_path / "out", tokenizer=tokenizer)
    converted = converted_golden("qwen2_5_vl_a", tmp_path)
    with pytest.raises(BuildError, match="nowhere is not a folder"):
        build(converted, tmp_path / "out", tokenizer=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match="holds no tokenizer"):
        build(converted, tmp_path / "out", tokenizer=tmp_path / "empty")
    qwen_tokenizer().save_pretrained(tmp_path / "large")
    with pytest.raises(BuildError, match="is another model's: it has 263 tokens.*the checkpoint has 128"):
        build(converted, tmp_path / "out", tokenizer=tmp_path / "large")
    (tokenizer / "chat_template.jinja").unlink()
    with pytest.raises(BuildError, match="has no chat template"):
        build(converted, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
