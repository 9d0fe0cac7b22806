"""Weights that were cut short or lost: the error names the file and says what to do, wherever it is read."""

import os
import shutil

import peft
import pytest
from transformers import AutoModelForImageTextToText

from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.evaluation.__main__ import main as evaluate
from modeling_qzoom.training.__main__ import main as train
from tests.loading_fixtures import attach, plain_folder
from tests.lora_support import needs_lora


load = QZoomForConditionalGeneration.from_pretrained
TINY = "100KB"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder with a base in one file and in shards, a full checkpoint of either kind, and an add-on."""
    folder = tmp_path_factory.mktemp("sources")
    model = attach(plain_folder("qwen2_5_vl", folder / "base"), "qwen2_5_vl")
    plain_folder("qwen2_5_vl", folder / "base-shards", max_shard_size=TINY)
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "full-shards", max_shard_size=TINY)
    model.save_addon(folder / "addon")
    return folder


@pytest.fixture
def folder(sources, tmp_path):
    return shutil.copytree(sources, tmp_path / "folder")


def cut(file):
    os.truncate(file, os.path.getsize(file) - 1)


def cut_header(file):
    os.truncate(file, 30)


def empty(file):
    os.truncate(file, 0)


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")


def page(file):
    file.write_text("<html>not found</html>" * 20)


def longer(file):
    with file.open("ab") as stream:
        stream.write(b"more")


DAMAGE = {
    cut: "cut short, .* bytes instead of",
    cut_header: "cut short, or no safetensors file",
    empty: "cut short, or no safetensors file",
    pointer: "Git LFS pointer.*git lfs pull",
    page: "no safetensors file",
    longer: "too long, .* bytes instead of",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["full", "addon", "base"])
def test_damaged_file(folder, which, damage):
    file = folder / which / "model.safetensors"
    damage(file)
    message = f"{file} cannot be read: .*{DAMAGE[damage]}"
    with pytest.raises(ValueError, match=message):
        if which == "base":
            load(folder / "addon", base_model_name_or_path=folder / "base")
        else:
            load(folder / which)
    with pytest.raises(ValueError, match=message):
        if which == "base":
            attach(folder / "base", "qwen2_5_vl")
        else:
            AutoModelForImageTextToText.from_pretrained(folder / which)


def test_damaged_base_while_saving(folder):
    model = load(folder / "addon", base_model_name_or_path=str(folder / "base-shards"))
    file = sorted((folder / "base-shards").glob("*.safetensors"))[2]
    cut(file)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: it is cut short"):
        model.save_addon(folder / "again")
    assert not (folder / "again").exists()


@pytest.mark.parametrize("which", ["full-shards", "base-shards"])
@pytest.mark.parametrize("placement", [{}, {"device_map": {"": "disk"}}])
def test_damaged_and_missing_shards(folder, which, placement):
    if placement:
        placement = {**placement, "offload_folder": folder / "off"}

    def read():
        if which == "full-shards":
            return load(folder / which, **placement)
        return attach(folder / which, "qwen2_5_vl", **placement)

    file = sorted((folder / which).glob("*.safetensors"))[1]
    cut(file)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: it is cut short"):
        read()
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: No such file"):
        read()
    (folder / which / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="index of the weights.*index.json, cannot be read"):
        read()


def test_damaged_variant(folder):
    load(folder / "full").save_pretrained(folder / "low", variant="fp16", max_shard_size=TINY)
    file = max((folder / "low").glob("*.safetensors"))
    cut(file)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: it is cut short"):
        load(folder / "low", variant="fp16")


def test_shards_of_an_addons_base(folder):
    file = min((folder / "base-shards").glob("*.safetensors"))
    cut(file)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: it is cut short"):
        load(folder / "addon", base_model_name_or_path=folder / "base-shards")
    file.unlink()
    with pytest.raises(ValueError, match=f"base.* cannot be read.*{file.name}"):
        load(folder / "addon", base_model_name_or_path=folder / "base-shards")


@needs_lora
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("place", ["lora", "adapter"])
def test_damaged_adapter(folder, place):
    model = load(folder / "full")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    if place == "lora":
        model.save_addon(folder / "with", base_model_name_or_path=folder / "base")
        file = folder / "with" / "lora" / "adapter_model.safetensors"
    else:
        model.save_pretrained(folder / "with")
        file = folder / "with" / "adapter_model.safetensors"
    cut(file)
    with pytest.raises(ValueError, match=f"{file} cannot be read: it is cut short"):
        load(folder / "with")


def test_commands_print_one_line(folder, tmp_path, capsys):
    cut(folder / "full" / "model.safetensors")
    assert evaluate(["--model", str(folder / "full"), "--rows", "2"]) == 1
    status = train(["label-regions", f"model={folder / 'full'}", f"output={tmp_path / 'out'}", "data=drawn:train"])
    assert status == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and all("model.safetensors" in line and "cut short" in line for line in lines)
