"""Files that were cut short or are of another kind: stages name them, and take an older whole checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_qzoom.data.config import DataConfig
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.training.__main__ import main
from modeling_qzoom.training.common.label_store import write_shard
from modeling_qzoom.training.common.run_folder import RECORD, newest_checkpoint
from modeling_qzoom.training.regions import train as train_regions
from modeling_qzoom.training.regions.config import LabelRule, TrainRegionsConfig
from tests.processing_fixtures import noise
from tests.training.stage_fixtures import budget, write_data, write_model, write_region_labels


FAMILY = "qwen3_vl"
HEADS = "grounding_heads={1: [2], 3: [0]}"
# one step per sequence of questions, a checkpoint after each
OPTIONS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "save_steps": 1,
    "save_total_limit": 10,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), FAMILY)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture(scope="module")
def finished_labels(model, data, tmp_path_factory) -> Path:
    return Path(write_region_labels(tmp_path_factory.mktemp("labels") / "made", model, data))


@pytest.fixture
def labels(finished_labels, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(finished_labels, tmp_path / "labels")


def cut(path: Path) -> None:
    """As a full disk leaves a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def error_of(capsys, *arguments: str) -> str:
    """The only line that a failing command ends with."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("error: ") == 1
    return said[said.index("error: ") :]


def training(model: str, labels: Path, output: Path) -> list[str]:
    options = [f"trainer.{name}={value}" for name, value in OPTIONS.items()]
    return ["train-regions", f"model={model}", f"labels={labels}", f"output={output}", "rule.dilation=0", *options]


@pytest.mark.parametrize(
    "override",
    [
        "limit=[1, 2",
        "limit={a: b: c}",
        "limit=2024-13-45",  # a date that YAML takes for one
        "limit={[1]: 2}",
        "limit=!!python/name:os.system",
        "limit=" + 3000 * "[",
        "prompt_suffix='one quote",
    ],
)
def test_an_override_that_is_no_yaml(override, model, data, capsys) -> None:
    said = error_of(capsys, "label-regions", f"model={model}", f"data={data}", "output=o", override)
    assert f"The value of {override} is no YAML" in said


@pytest.mark.parametrize("value", ["--5", "٣", "1_0.5", "5" * 30])
def test_what_is_nearly_a_number(value, model, data, capsys) -> None:
    said = error_of(capsys, "label-regions", f"model={model}", f"data={data}", "output=o", f"shard_size='{value}'")
    assert f"shard_size must be of type int, got '{value}'" in said


@pytest.mark.parametrize(
    "content",
    [b"", b'{"stage": "label-reg', b"\xff\xfe{}", b"[]", b'{"stage": "label-regions"}', 5000 * b"["],
    ids=["empty", "cut", "not UTF-8", "no mapping", "lacks names", "nested"],
)
def test_a_damaged_record_of_labels(content, model, data, labels, tmp_path, capsys) -> None:
    (labels / "labels.json").write_bytes(content)
    said = error_of(capsys, *training(model, labels, tmp_path / "out"))
    assert f"{labels}/labels.json" in said and "delete its folder" in said
    said = error_of(capsys, "label-regions", f"model={model}", f"data={data}", f"output={labels}", HEADS)
    assert f"{labels}/labels.json" in said


def test_a_shard_that_was_cut_short(model, labels, tmp_path, capsys) -> None:
    shard = labels / "labels-00001-of-00002.parquet"
    cut(shard)
    said = error_of(capsys, *training(model, labels, tmp_path / "out"))
    assert str(shard) in said and "delete this file and run its stage again" in said
    shard.unlink()
    shard.with_suffix(".other").write_bytes(b"")
    assert "1 of 2 shards are missing" in error_of(capsys, *training(model, labels, tmp_path / "out"))


def test_a_shard_of_something_else(model, labels, tmp_path, capsys) -> None:
    shard = labels / "labels-00001-of-00002.parquet"
    write_shard(shard, [{"id": "0-0", "replies": ["x"]}], [])
    said = error_of(capsys, *training(model, labels, tmp_path / "out"))
    assert f"{shard} holds ['id', 'replies'] where labels have" in said


def test_label_making_names_a_shard_that_was_cut_short(model, data, tmp_path, capsys) -> None:
    output = tmp_path / "labels"
    command = ["label-regions", f"model={model}", f"data={data}", f"output={output}", "shard_size=4", HEADS]
    command += ["max_new_tokens=2", "max_tokens=16"]
    assert main(command) == 0
    shard = output / "labels-00000-of-00002.parquet"
    whole = shard.read_bytes()
    cut(shard)
    capsys.readouterr()
    assert str(shard) in error_of(capsys, *command)
    shard.unlink()
    assert main(command) == 0 and shard.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b'{"stage": ', b"\x80", b"3", b'{"finished": true}', b'{"stage": 1, "options": 2}']
)
def test_a_damaged_record_of_a_run(content, model, labels, tmp_path, capsys) -> None:
    record = tmp_path / "out" / "trainer" / RECORD
    record.parent.mkdir(parents=True)
    record.write_bytes(content)
    said = error_of(capsys, *training(model, labels, tmp_path / "out"))
    assert str(record) in said and f"delete {tmp_path}/out to train anew" in said


def _weights(config: TrainRegionsConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "model.safetensors")


@pytest.fixture(scope="module")
def trained(model, finished_labels, tmp_path_factory) -> TrainRegionsConfig:
    """A run that kept its checkpoints."""
    config = TrainRegionsConfig(
        model=model,
        labels=str(finished_labels),
        output=str(tmp_path_factory.mktemp("trained") / "out"),
        **budget(FAMILY),
        rule=LabelRule(dilation=0),
        trainer=OPTIONS,
    )
    train_regions.run(config)
    return config


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_the_newest_checkpoint_was_cut_short(name, trained, tmp_path, caplog) -> None:
    """The run goes on from the one before it, says so, and ends as it did."""
    expected = _weights(trained)
    output = shutil.copytree(trained.output, tmp_path / "out")
    work = output / "trainer"
    record = json.loads((work / RECORD).read_text())
    config = TrainRegionsConfig(**{**vars(trained), "output": str(output)})
    record |= {"finished": False, "options": record["options"] | {"output": str(output)}}
    (work / RECORD).write_text(json.dumps(record))
    (output / "model.safetensors").unlink()
    shutil.rmtree(work / "checkpoint-4")  # the end of the run
    cut(work / "checkpoint-3" / name)
    assert newest_checkpoint(work) == work / "checkpoint-2"
    caplog.clear()
    train_regions.run(config)
    assert "checkpoint-3 is passed over for an older checkpoint" in caplog.text and name in caplog.text
    found = _weights(config)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, atol=1e-6, rtol=0, msg=key)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_model_that_was_cut_short(name, model, data, tmp_path, capsys) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    cut(folder / name)
    command = ["label-regions", f"model={folder}", f"data={data}", f"output={tmp_path}/labels", HEADS]
    said = error_of(capsys, *command)
    assert f"{folder}/{name}" in said and not (tmp_path / "labels").exists()


def test_a_chat_template_in_another_encoding(model, data, tmp_path, capsys) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ 'Grüße' }}", encoding="latin-1")
    said = error_of(capsys, "label-regions", f"model={folder}", f"data={data}", f"output={tmp_path}/labels", HEADS)
    assert f"{folder}/chat_template.jinja is damaged" in said


def test_calibrate_names_a_damaged_configuration(model, data, tmp_path, capsys) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "config.json").write_text("{'model_type': 'qzoom'}")
    said = error_of(capsys, "calibrate", f"model={folder}", f"data={data}")
    assert f"{folder}/config.json cannot be read" in said


def test_a_heads_file_with_other_types_is_named(model, data, tmp_path, capsys) -> None:
    (tmp_path / "heads.yaml").write_text("grounding_heads: {1: many}\n")
    command = ["label-regions", f"model={model}", f"data={data}", f"output={tmp_path}/labels"]
    assert f"heads={tmp_path}/heads.yaml: " in error_of(capsys, *command, f"heads={tmp_path}/heads.yaml")


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("find-heads", "output=FOLDER", "is a folder; name a file"),
        ("find-heads", "output=FOLDER/file/heads.yaml", "file is no folder"),
        ("calibrate", "report=FOLDER", "is a folder; name a file"),
        ("calibrate", "output=FOLDER/file", "file is a file; choose a folder to save to"),
    ],
)
def test_a_result_that_could_not_be_written_is_refused_before_the_run(
    stage, option, message, model, data, tmp_path, capsys, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    for module in ("regions.find_heads", "calibration.calibrate"):
        monkeypatch.setattr(f"modeling_qzoom.training.{module}.open_session", lambda config: pytest.fail("it ran"))
    more = [f"data={data}"] if stage == "calibrate" else []
    said = error_of(capsys, stage, f"model={model}", *more, option.replace("FOLDER", str(tmp_path)))
    assert message in said


def test_bad_lines_of_a_data_file_are_named_and_the_others_used(tmp_path, caplog) -> None:
    noise(20, 10).save(tmp_path / "a.png")
    good = [json.dumps({"id": str(n), "image": "a.png", "question": f"wo ist {n}?"}).encode() for n in range(8)]
    bad = [
        '{"image": "a.png", "question": "Größe?"}'.encode("latin-1"),
        b'{"image": "a.png", "question": "half a \\ud83d?"}',
        b'{"image": "a.png", "question": "q?", "answer": ["\\ude00"]}',
        5000 * b"[",
        b'{"image": "a.png", "question": "q?", "answer": ' + 5000 * b"1" + b"}",
        b'{"image": "' + 300 * b"a" + b'.png", "question": "q?"}',
        bytes(range(128, 256)),
    ]
    lines = [b"\xef\xbb\xbf" + good[0], *bad[:3], *good[1:4], *bad[3:], *good[4:]]
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n".join(lines))
    rows = load_rows(DataConfig(data=str(tmp_path / "rows.jsonl")))
    assert [row.id for row in rows] == [str(n) for n in range(8)]
    assert "7 of 15 rows skipped" in caplog.text
    assert "rows.jsonl, line 2: is no text in UTF-8" in caplog.text and "line 3: " in caplog.text


def test_a_damaged_picture_in_a_dataset_is_named_and_skipped(tmp_path, caplog) -> None:
    import datasets

    noise(20, 10).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    pictures = [{"bytes": value, "path": None} for value in (content, content[:20], content)]
    table = datasets.Dataset.from_dict({"image": pictures, "question": ["q0", "q1", "q2"]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    rows = load_rows(DataConfig(data=str(tmp_path / "saved")))
    assert [row.question for row in rows] == ["q0", "q2"] and "skipped saved, row 1" in caplog.text


def test_a_damaged_dataset_is_named(tmp_path) -> None:
    import datasets

    datasets.Dataset.from_dict({"image": ["a.png"], "question": ["q"]}).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved" / "state.json", next((tmp_path / "saved").glob("*.arrow"))):
        whole = path.read_bytes()
        cut(path)
        with pytest.raises(ValueError, match=f"data={tmp_path}/saved cannot be loaded"):
            load_rows(DataConfig(data=str(tmp_path / "saved")))
        path.write_bytes(whole)
