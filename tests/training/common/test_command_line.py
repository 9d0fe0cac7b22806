"""The command line of the stages: it runs them, and says in one line what is wrong with its input."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from modeling_qzoom.training.__main__ import STAGES, main
from modeling_qzoom.training.common.label_store import read_labels
from tests.families import FAMILY
from tests.processing_fixtures import PROCESSORS
from tests.tiny import FAMILIES, tiny_vlm
from tests.training.stage_fixtures import write_data, write_model, write_region_labels


HEADS = "grounding_heads={1: [2], 3: [0]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "rows")


def _label(model: str, data: str, output: Path, *options: str) -> list[str]:
    usual = [f"model={model}", f"data={data}", f"output={output}", "max_new_tokens=4", "max_tokens=16", HEADS]
    return ["label-regions", *usual, *options]


def _error(arguments: list[str], capsys) -> str:
    """The only line that a failing command ends with."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("error: ") == 1
    return said[said.index("error: ") :].rstrip("\n")


def test_every_stage_has_its_module() -> None:
    for name, stage in STAGES.items():
        assert importlib.util.find_spec(f"modeling_qzoom.training.{stage.module}") is not None, name


def test_help_lists_the_stages(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"  {name} " in said for name in STAGES)
    with pytest.raises(SystemExit) as stopped:
        main(["label-region"])
    assert stopped.value.code == 2 and "invalid choice: 'label-region'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(STAGES))
@pytest.mark.parametrize("order", [1, -1])
def test_help_of_a_stage_lists_every_option_with_type_default_and_help(name, order, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"][::order])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    for field in dataclasses.fields(STAGES[name].config):
        assert field.metadata["help"], field.name
        entry = next(number for number, line in enumerate(lines) if line.startswith(f"  {field.name}: "))
        nested = dataclasses.is_dataclass(field.type)
        text = lines[entry] if nested else f"{lines[entry]} {lines[entry + 1].strip()}"
        assert nested or ", default " in text or ", required" in text
        assert field.metadata["help"][:40] in text


def test_help_says_what_to_write(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train-regions", "--help"])
    said = capsys.readouterr().out
    assert "  labels: str, required\n" in said and "  reset: bool, default true\n" in said
    assert "  revision: str | None, default null\n" in said and "  rule.foreground: float, default 0.25\n" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_then_labels_from_a_plain_vlm(family, data, tmp_path) -> None:
    tiny_vlm(family).save_pretrained(tmp_path / "vlm")
    PROCESSORS[family]().backbone_processor.save_pretrained(tmp_path / "vlm")
    options = {"model": str(tmp_path / "vlm"), "branch_layer": 3, "branch_depth": 2, "max_new_tokens": 4}
    if FAMILY[family].has_budget:
        options["max_tokens"] = 16
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(options))
    command = ["--config", str(tmp_path / "model.yaml")]
    assert main(["find-heads", *command, f"output={tmp_path}/heads.yaml", "--pages=2"]) == 0
    asked = [f"heads={tmp_path}/heads.yaml", f"data={data}", f"output={tmp_path}/labels"]
    assert main(["label-regions", *asked, *command]) == 0
    assert len(list(read_labels(tmp_path / "labels", "label-regions", None))) == 8


def test_one_unreadable_image_among_many_is_skipped_counted_and_named(model, tmp_path, caplog) -> None:
    data = write_data(tmp_path / "data", images=4, questions=1)
    (tmp_path / "data" / "2.png").write_bytes(b"no picture")
    assert main(_label(model, data, tmp_path / "labels")) == 0
    assert len(list(read_labels(tmp_path / "labels", "label-regions", None))) == 3
    assert "skipped 2-0: " in caplog.text and "1 of 4 rows skipped" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["batchsize=3"], "There is no option batchsize; did you mean batch_size?"),
        (["--batch-size=3"], "There is no option batch-size; did you mean batch_size?"),
        (["--batch_size", "3"], "An override has the form name=value, got '--batch_size'."),
        (["batch_size=many"], "batch_size must be of type int, got 'many'."),
        (["batch_size"], "An override has the form name=value, got 'batch_size'."),
        (["--config", "none.yaml"], "The configuration none.yaml cannot be read"),
        (["data=none.jsonl"], "data=none.jsonl: no JSONL or parquet file"),
        (["data=drawn:trian"], "There is no split 'trian'"),
        (["images=nowhere"], "images=nowhere: there is no such folder."),
        (["model=/nowhere/at/all"], "model=/nowhere/at/all: "),
        (["grounding_heads={6: [0]}"], "The heads name layer 6; the model has layers 0 to 5."),
        (["grounding_heads={}"], "run find-heads"),
        (["heads=none.yaml", "grounding_heads={}"], "The configuration none.yaml cannot be read"),
        (["output=/proc/labels"], "/proc/labels"),
        (["batch_size=0"], "batch_size must be at least 1, got 0."),
        (["shard_size=0"], "shard_size must be at least 1, got 0."),
    ],
)
def test_what_is_wrong_with_an_option_is_said_in_one_line(options, message, model, data, tmp_path, capsys) -> None:
    said = _error(_label(model, data, tmp_path / "labels", *options), capsys)
    assert message in said and "\n" not in said


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "it is empty"),
        ([{"image": "0.png", "text": "q?"}], "lacks ['question']; it has ['image', 'text']"),
        ([{"image": "missing.png", "question": "q?"}], "there is no image"),
        (["no json"], "is no mapping"),
    ],
)
def test_what_is_wrong_with_data_is_said_in_one_line(records, message, model, tmp_path, capsys) -> None:
    write_data(tmp_path / "data", images=1)
    data = tmp_path / "data" / "wrong.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = _error(_label(model, str(data), tmp_path / "labels"), capsys)
    assert "0 usable rows" in said and message in said and "\n" not in said


def test_unreadable_images_only(model, tmp_path, capsys) -> None:
    data = write_data(tmp_path / "data", images=1)
    (tmp_path / "data" / "0.png").write_bytes(b"no picture")
    said = _error(_label(model, data, tmp_path / "labels"), capsys)
    assert "0 usable rows and 2 unusable ones, such as 0-0: " in said


@pytest.mark.parametrize("stage", ["find-heads", "label-regions"])
def test_backbones_that_do_not_fit(stage, data, tmp_path, capsys) -> None:
    more = [f"data={data}", HEADS] if stage == "label-regions" else []
    LlamaConfig().save_pretrained(tmp_path / "llama")
    command = [stage, f"output={tmp_path}/output", *more]
    said = _error([*command, f"model={tmp_path}/llama", "branch_layer=1"], capsys)
    assert "no row for model_type 'llama'" in said
    tiny_vlm("qwen2_5_vl").save_pretrained(tmp_path / "vlm")
    PROCESSORS["qwen2_5_vl"]().backbone_processor.save_pretrained(tmp_path / "vlm")
    said = _error([*command, f"model={tmp_path}/vlm", "branch_layer=6"], capsys)
    assert "exceeds the VLM's 6 decoder layers; choose branch_layer ≤ 3" in said
    assert "say with branch_layer=K" in _error([*command, f"model={tmp_path}/vlm"], capsys)
    (tmp_path / "vlm" / "model.safetensors").unlink()
    said = _error([*command, f"model={tmp_path}/vlm", "branch_layer=3"], capsys)
    assert "model.safetensors" in said and "\n" not in said


def test_labels_of_another_backbone(data, model, tmp_path, capsys) -> None:
    labels = write_region_labels(tmp_path / "labels", write_model(tmp_path / "other", "qwen2_5_vl", seed=5), data)
    said = _error(["train-regions", f"model={model}", f"labels={labels}", f"output={tmp_path}/trained"], capsys)
    assert "were made by another backbone than the model that is to be trained: run 'label-regions'" in said
    said = _error(_label(model, data, tmp_path / "labels"), capsys)
    assert "holds labels whose backbone, settings, shards differ" in said
