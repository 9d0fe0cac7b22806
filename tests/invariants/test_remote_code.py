"""Folders that load with trust_remote_code in processes where this package cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modeling_qzoom
from hub_release import build as build_module
from hub_release.build import build
from hub_release.checks.clean_environment import disagreements, probe
from hub_release.repository.code import published_files
from hub_release.repository.errors import BuildError
from hub_release.repository.files import AUTO_MAPS
from modeling_qzoom import QZoomForConditionalGeneration
from tests.loading_fixtures import attach, edit_weights, plain_folder, weights_equal
from tests.processing_fixtures import PROCESSORS, noise
from tests.release_fixtures import built_folder, clean_python, data_folder
from tests.tiny import FAMILIES, tiny_vlm


OPTIONS = {"gate_threshold": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return built_folder("qwen2_5_vl", tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def probed(built, image):
    """What a process of its own, which cannot import `modeling_qzoom`, says about the folder."""
    return probe(built, image, "what is the code?", options=OPTIONS)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "page.png"
    noise(300, 220).save(path)
    return path


def _code(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def _auto_map(folder: Path, name: str = "config.json") -> dict[str, str]:
    return json.loads((folder / name).read_text())["auto_map"]


def test_saving_writes_every_reference_and_file(tmp_path):
    attach(tiny_vlm("qwen2_5_vl"), "qwen2_5_vl").save_pretrained(tmp_path)
    assert _auto_map(tmp_path) == AUTO_MAPS["config.json"]
    PROCESSORS["qwen2_5_vl"]().save_pretrained(tmp_path)
    assert _auto_map(tmp_path, "processor_config.json") == AUTO_MAPS["processor_config.json"]
    assert _code(tmp_path) == {path.name for path in published_files()}
    for path in published_files():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_published_code_is_all_of_the_flat_package():
    flat = {path.name for path in Path(modeling_qzoom.__file__).parent.glob("*_qzoom.py")}
    assert {path.name for path in published_files()} == flat


def test_build_adds_code_and_references_only(tmp_path):
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    output = build(data, tmp_path / "out")
    assert _code(output) == {path.name for path in published_files()}
    assert _auto_map(output) == AUTO_MAPS["config.json"]
    assert _auto_map(output, "processor_config.json") == AUTO_MAPS["processor_config.json"]
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before
    for name in set(before) - {"config.json", "processor_config.json", "README.md"}:
        assert (output / name).read_bytes() == before[name]
    for name in ("LICENSE", "NOTICE"):
        assert (output / name).read_bytes() == (build_module.ROOT / name).read_bytes()


def test_build_of_an_addon(tmp_path):
    attach(plain_folder("qwen2_5_vl", tmp_path / "base"), "qwen2_5_vl").save_addon(tmp_path / "addon")
    assert _auto_map(build(tmp_path / "addon", tmp_path / "out")) == AUTO_MAPS["config.json"]


def test_force_replaces_nothing_but_a_repository(tmp_path):
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    base = Path(plain_folder("qwen2_5_vl", tmp_path / "base"))
    trained = Path(shutil.copytree(data, tmp_path / "trained"))
    clone = build(data, tmp_path / "clone")
    (clone / ".git").mkdir()
    (clone / ".git" / "HEAD").write_text("")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("")
    for output in (base, trained, clone, tmp_path / "letters"):
        before = sorted(path.name for path in output.rglob("*"))
        with pytest.raises(BuildError, match="something else than a repository that was built before"):
            build(data, output, force=True)
        assert sorted(path.name for path in output.rglob("*")) == before
    for options in ({"base_folder": base}, {"tokenizer": base}):
        with pytest.raises(BuildError, match=r"a folder that is read|has a processor and a tokenizer of its own"):
            build(data, base, force=True, **options)


def test_a_build_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    output = build(data, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(build_module, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        build(data, output, force=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_build_refusals(tmp_path):
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    output = build(data, tmp_path / "out")
    with pytest.raises(BuildError, match="is not empty.*--force"):
        build(data, output)
    (output / "stale.txt").write_text("")
    assert not (build(data, output, force=True) / "stale.txt").exists()
    with pytest.raises(BuildError, match="the checkpoint itself"):
        build(data, data, force=True)
    with pytest.raises(BuildError, match="a folder that is read"):
        build(data, output, force=True, base_folder=plain_folder("qwen2_5_vl", output / "base"))
    with pytest.raises(BuildError, match="not a folder"):
        build(tmp_path / "nowhere", tmp_path / "x")
    edit_weights(data, drop="zoom.")
    with pytest.raises(BuildError, match="hold no branches"):
        build(data, tmp_path / "x")
    (data / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00hello")
    with pytest.raises(BuildError, match="not a safetensors file"):
        build(data, tmp_path / "x")
    (data / "model.safetensors").unlink()
    with pytest.raises(BuildError, match="has no weights"):
        build(data, tmp_path / "x")
    (data / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(BuildError, match="not that of a Q-Zoom checkpoint.*llava"):
        build(data, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_build_command_needs_the_standard_library_only(tmp_path):
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    command = [sys.executable, "-I", "-S", build_module.__file__, str(data), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "modeling_qzoom.py").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is not empty" in done.stderr


def test_every_door_gives_the_same_answer(probed):
    """Also after saving and loading once more, there."""
    answers = probed["answers"]
    assert "modeling_qzoom" not in probed["present"]
    assert set(answers) == {
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "pipeline",
        "reloaded",
    }
    assert disagreements(answers) == []
    assert answers["AutoModel"]["box"] is not None
    assert probed["auto_map"] == AUTO_MAPS["config.json"]
    assert probed["code"] == sorted(path.name for path in published_files())


def test_package_and_remote_code_agree(built, image, probed):
    """What the installed package answers is what the folder's own code answers."""
    result = probed["answers"]["AutoModel"]
    model = QZoomForConditionalGeneration.from_pretrained(built)
    processor = modeling_qzoom.QZoomProcessor.from_pretrained(built)
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "what is the code?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    output = model.generate(**inputs, **OPTIONS, do_sample=False, return_zoom_reports=True)
    assert output.sequences[0, inputs["input_ids"].shape[1] :].tolist() == result["tokens"]
    assert list(output.zoom_reports[0].box) == result["box"]
    assert abs(output.zoom_reports[0].gate_probability - result["gate_probability"]) < 1e-5


_TWO_COPIES = """
import json, sys
import torch, transformers
folder, out = sys.argv[1:]
kwargs = {"trust_remote_code": True}
config = transformers.AutoConfig.from_pretrained(folder, gate_threshold=0.4, **kwargs)
model, info = transformers.AutoModel.from_pretrained(
    folder, config=config, dtype=torch.bfloat16, device_map={"": "cpu"}, output_loading_info=True,
    attn_implementation={"": "eager", "vlm_config": "sdpa"}, **kwargs)
assert type(config) is not type(model).config_class  # two copies of our modules
assert model.config.gate_threshold == 0.4 and model.dtype == torch.bfloat16
assert model.config._attn_implementation == "eager" and model.get_decoder().config._attn_implementation == "sdpa"
assert not info["missing_keys"] and not info["unexpected_keys"]
recipe = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.visual"])
small = transformers.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=recipe, **kwargs)
assert type(small.zoom.gate.head) is torch.nn.Linear
assert type(small.zoom.gate.layers[0].mlp.up_proj) is not torch.nn.Linear
made = transformers.AutoModelForImageTextToText.from_config(config, **kwargs)
assert type(made).__name__ == "QZoomForConditionalGeneration"
base = type(model).from_backbone(sys.argv[1] + "-base", branch_layer=2, branch_depth=2)
base.save_addon(out)
addon = transformers.AutoModelForImageTextToText.from_pretrained(out, **kwargs)
assert all(torch.equal(left, right) for left, right in zip(base.state_dict().values(), addon.state_dict().values()))
moved = transformers.AutoModelForMultimodalLM.from_pretrained(
    out, base_model_name_or_path=sys.argv[1] + "-base", dtype="auto", **kwargs)
assert moved.config.branch_layer == 2
"""


def test_arguments_through_auto_classes(built, tmp_path):
    """dtype, devices, attention by part, quantization, a given config and add-ons, all in remote code."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    shutil.copytree(built, tmp_path / "model")
    plain_folder("qwen2_5_vl", tmp_path / "model-base")
    (tmp_path / "child.py").write_text(_TWO_COPIES)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", tmp_path / "child.py", tmp_path / "model", tmp_path / "addon"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _auto_map(tmp_path / "addon") == AUTO_MAPS["config.json"]
    # and what remote code saved, the installed package loads
    assert weights_equal(
        QZoomForConditionalGeneration.from_pretrained(tmp_path / "addon").vlm,
        QZoomForConditionalGeneration.from_pretrained(built).vlm,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_clean_environment(image, tmp_path, family):
    """With torch, transformers and pillow alone, every door answers as it does here."""
    folder = built_folder(family, tmp_path)
    clean = probe(folder, image, "what is the code?", python=clean_python(), options=OPTIONS)
    assert clean["present"] == []
    assert disagreements(clean["answers"]) == []
    here = probe(folder, image, "what is the code?", options=OPTIONS)
    assert disagreements({"clean": clean["answers"]["AutoModel"], "here": here["answers"]["AutoModel"]}) == []
    assert torch.isfinite(torch.tensor(clean["answers"]["AutoModel"]["gate_probability"]))
