"""Saving never destroys what is not an earlier save of the same kind, and what is interrupted changes nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from modeling_qzoom import QZoomForConditionalGeneration
from tests.loading_fixtures import attach, perturb_branches, plain_folder, weights_equal
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_vlm


load = QZoomForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(model, its base, its full checkpoint, its add-on), none of which a test changes."""
    folder = tmp_path_factory.mktemp("sources")
    model = attach(plain_folder("qwen2_5_vl", folder / "base"), "qwen2_5_vl")
    model.save_pretrained(folder / "full")
    model.save_addon(folder / "addon")
    return model, folder / "base", folder / "full", folder / "addon"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def save(model, kind: str, folder) -> None:
    model.save_addon(folder) if kind == "addon" else model.save_pretrained(folder)


def by_link(base: Path) -> Path:
    link = base.parent / "link"
    link.symlink_to(base, target_is_directory=True)
    return link


SPELLINGS = {
    "plain": lambda base: base,
    "text": str,
    "slash": lambda base: f"{base}/",
    "dots": lambda base: f"{base}/../{base.name}/.",
    "relative": os.path.relpath,
    "link": by_link,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["addon", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_keeps_its_weights(family, kind, spelling, tmp_path):
    base = Path(plain_folder(family, tmp_path / "base"))
    model = attach(base, family)
    before = contents(base)
    with pytest.raises(ValueError, match="is the folder of the base model"):
        save(model, kind, SPELLINGS[spelling](base))
    assert contents(base) == before
    assert weights_equal(AutoModelForImageTextToText.from_pretrained(base), tiny_vlm(family))


def test_the_base_that_is_named_in_the_call(sources, tmp_path):
    model, base, *_ = sources
    copy = shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(ValueError, match="is the folder of the base model"):
        model.save_addon(copy, base_model_name_or_path=copy)
    assert contents(copy) == contents(base)


@pytest.mark.parametrize("kind", ["addon", "full"])
def test_weights_that_are_links_to_the_base_are_replaced_not_written_through(kind, sources, tmp_path):
    """As in the Hub's cache, and in folders that share files."""
    model, base, full, addon = sources
    base = shutil.copytree(base, tmp_path / "base")
    old = shutil.copytree(addon if kind == "addon" else full, tmp_path / "old")
    hard, soft = tmp_path / "hard", tmp_path / "soft"
    for folder, link in ((hard, os.link), (soft, os.symlink)):
        folder.mkdir()
        for path in old.glob("*.*"):
            link(path, folder / path.name)
    before = contents(old)
    changed = perturb_branches(load(full, base_model_name_or_path=str(base)), seed=9)
    for folder in (hard, soft):
        save(changed, kind, folder)
        assert weights_equal(load(folder), changed)
    assert contents(old) == before


def foreign_model(folder, sources):
    tiny_vlm("llava").save_pretrained(folder)


def sharded_foreign_model(folder, sources):
    tiny_vlm("qwen3_vl").save_pretrained(folder, max_shard_size="200KB")


def weights_alone(folder, sources):
    shutil.copy(sources[1] / "model.safetensors", folder)


def pickled_weights(folder, sources):
    torch.save({}, folder / "pytorch_model.bin")


def unknown_weights(folder, sources):
    (folder / "model.safetensors").write_bytes(b"something")


def other_configuration(folder, sources):
    (folder / "config.json").write_text('{"some": "thing"}')


def damaged_configuration(folder, sources):
    (folder / "config.json").write_text('{"model_type": "qz')


def adapter(folder, sources):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


HELD = {
    foreign_model: "a plain 'llava' model",
    sharded_foreign_model: "a plain 'qwen3_vl' model",
    weights_alone: "the weights of another model",
    pickled_weights: r"the weights of another model \(pytorch_model.bin\)",
    unknown_weights: "weights that cannot be read",
    other_configuration: "another model's config.json",
    damaged_configuration: "a config.json that cannot be read",
    adapter: "a LoRA adapter",
}


@pytest.mark.parametrize("make", HELD)
@pytest.mark.parametrize("kind", ["addon", "full"])
def test_folders_of_others_are_refused(kind, make, sources, tmp_path):
    make(tmp_path, sources)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds {HELD[make]}, which .* would overwrite or be mixed with"):
        save(sources[0], kind, tmp_path)
    assert contents(tmp_path) == before


def test_full_checkpoint_and_addon_do_not_replace_each_other(sources, tmp_path):
    model, _, full, addon = sources
    for kind, source, held in (("addon", full, "a full Q-Zoom checkpoint"), ("full", addon, "a Q-Zoom add-on")):
        folder = shutil.copytree(source, tmp_path / kind)
        with pytest.raises(ValueError, match=f"holds {held}, which"):
            save(model, kind, folder)
        assert contents(folder) == contents(source)


def test_a_file_is_no_folder(sources, tmp_path):
    (tmp_path / "file").write_text("mine")
    for kind in ("addon", "full"):
        with pytest.raises(ValueError, match="is a file; choose a folder"):
            save(sources[0], kind, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_files_that_belong_beside_a_model_stay(sources, tmp_path):
    for name in ("README.md", "tokenizer.json", "trainer_state.json"):
        (tmp_path / name).write_text(name)
    for kind in ("addon", "full"):
        folder = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{kind}")
        save(sources[0], kind, folder)
        assert (folder / "tokenizer.json").read_text() == "tokenizer.json"
        assert weights_equal(load(folder), sources[0])


@pytest.mark.parametrize("kind", ["addon", "full"])
def test_an_earlier_save_of_the_same_kind_is_replaced(kind, sources, tmp_path):
    _, _, full, addon = sources
    folder = shutil.copytree(addon if kind == "addon" else full, tmp_path / "folder")
    changed = perturb_branches(load(folder), seed=4)  # on the CPU, its weights are those of the file that goes
    expected = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
    save(changed, kind, folder)
    again = load(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_nothing_of_an_earlier_layout_is_read(variant, sources, tmp_path):
    model = sources[0]
    names = {} if variant is None else {"variant": variant}
    changed = perturb_branches(load(sources[2]), seed=4)
    for first, second in (({"max_shard_size": "300KB"}, {}), ({}, {"max_shard_size": "300KB"})):
        folder = tmp_path / str(len(first))
        model.save_pretrained(folder, **first, **names)
        changed.save_pretrained(folder, **second, **names)
        assert weights_equal(load(folder, **names), changed)
        index = list(folder.glob("*.index*.json"))
        assert bool(index) == bool(second)
        listed = set(json.loads(index[0].read_text())["weight_map"].values()) if index else None
        assert listed is None or listed == {path.name for path in folder.glob("*.safetensors")}


def test_what_an_interrupted_save_left_is_replaced(sources, tmp_path):
    folder = shutil.copytree(sources[2], tmp_path / "folder")
    os.truncate(folder / "model.safetensors", 50)
    sources[0].save_pretrained(folder)
    assert weights_equal(load(folder), sources[0])


@pytest.mark.parametrize("kind", ["addon", "full"])
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_save_leaves_the_old_files_whole(kind, exists, sources, tmp_path, monkeypatch):
    model, _, full, addon = sources
    folder = tmp_path / "folder"
    if exists:
        shutil.copytree(addon if kind == "addon" else full, folder)
    before = contents(folder)
    changed = perturb_branches(load(full), seed=4)

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(changed.generation_config), "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        save(changed, kind, folder)
    assert contents(folder) == before and folder.exists() == exists


def test_trainer_saves_as_often_as_it_likes(sources, tmp_path):
    model = load(sources[2])
    inputs = plain_inputs(make_inputs("qwen2_5_vl", [Row(["a ", None, " b?"], [(2, 3)])]))
    batch = {**inputs, "labels": inputs["input_ids"]}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        per_device_train_batch_size=1,
    )
    trainer = Trainer(model, arguments, train_dataset=[0, 1, 2], data_collator=lambda rows: batch)
    for _ in range(2):  # a second run goes into the folders of the first
        trainer.train()
        trainer.save_model()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert weights_equal(load(folder), model)
    before = contents(sources[1])
    with pytest.raises(ValueError, match="is the folder of the base model"):
        trainer.save_model(str(sources[1]))
    assert contents(sources[1]) == before
