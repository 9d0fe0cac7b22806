"""`label-regions`: what its records hold, and that stopping it anywhere changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modeling_qzoom.asking.fingerprints import backbone_fingerprint
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.data.bad_rows import BadRows
from modeling_qzoom.data.drawn.rows import drawn_rows
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.data.records import read_parquet
from modeling_qzoom.training.common.config_files import load_config
from modeling_qzoom.training.common.label_store import read_labels, read_manifest
from modeling_qzoom.training.regions.config import LabelRegionsConfig, LabelRule
from modeling_qzoom.training.regions.label import RegionLabeler, run
from modeling_qzoom.training.regions.record import RegionRecord
from modeling_qzoom.training.regions.rule import load_region_targets
from tests.families import FAMILY
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import budget, rows_of, write_data, write_model


ROOT = Path(__file__).parents[3]
HEADS = {"grounding_heads": {1: [2], 3: [0, 1]}, "sink_heads": {2: [3]}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "rows", images=5)


def _config(model: str, data: str, output: Path, family: str = "qwen2_5_vl", **options) -> LabelRegionsConfig:
    usual = {"max_new_tokens": 4, "batch_size": 3, "shard_size": 4, **HEADS, **budget(family)}
    return LabelRegionsConfig(model=model, data=data, output=str(output), **{**usual, **options})


@pytest.fixture(scope="module")
def made(model, data, tmp_path_factory) -> Path:
    """Finished labels that no test may change."""
    folder = tmp_path_factory.mktemp("made")
    run(_config(model, data, folder))
    return folder


def _contents(folder: Path) -> dict[str, list]:
    """Everything that a folder of labels holds."""
    shards = {path.name: read_parquet(path) for path in sorted(folder.glob("*.parquet"))}
    return {**shards, "manifest": json.loads((folder / "labels.json").read_text())}


@pytest.mark.parametrize("family", FAMILIES)
def test_records_of_every_family(family, data, tmp_path) -> None:
    config = _config(write_model(tmp_path / "model", family), data, tmp_path / "labels", family)
    run(config)
    session = open_session(config)
    records = list(read_labels(config.output, "label-regions", backbone_fingerprint(session.model)))
    rows = rows_of(config.output, "label-regions")
    assert [record["id"] for record in records] == list(rows) and len(records) == 10
    for record in records:
        row = rows[record["id"]]
        assert (record["question"], record["image_id"], record["answers"]) == (
            row.question,
            row.image_id,
            list(row.answers),
        )
        cells = record["height"] * record["width"]
        assert len(record["grounding"]) == len(record["sinks"]) == cells
        assert cells == 16 if not FAMILY[family].has_budget else 4 <= cells <= 16
        assert 0 < sum(record["grounding"]) < 1 and 0 < sum(record["sinks"]) < 1
        assert record["image_width"] == row.load_image().width and record["box"] is None
        assert (record["content"] is not None) == (not FAMILY[family].has_budget)
        targets = load_region_targets(RegionRecord.from_row(record), (3, 3), LabelRule())
        assert set(targets.unique().tolist()) <= {1, 0, -100}


def test_maps_are_means_over_the_chosen_heads(model, data, made, tmp_path) -> None:
    config = _config(model, data, tmp_path)
    session, rows = open_session(config), load_rows(config)[:2]
    single = []
    for heads in ({1: [2]}, {3: [0]}, {3: [1]}, {2: [3]}):
        config = _config(model, data, tmp_path, grounding_heads=heads, sink_heads={})
        single.append(RegionLabeler(session, config)(rows, BadRows("test")))
    for record, *parts in zip(list(read_labels(made, "label-regions", None))[:2], *single, strict=True):
        maps = [part["grounding"] for part in parts]
        np.testing.assert_allclose(record["grounding"], np.mean(maps[:3], axis=0), atol=1e-6)
        np.testing.assert_allclose(record["sinks"], maps[3], atol=1e-6)
        assert not parts[0]["sinks"].any()


def test_drawn_pages_bring_their_boxes(model, tmp_path) -> None:
    run(_config(model, "drawn:train", tmp_path / "labels", limit=4))
    rows = drawn_rows("train", 4, 0)
    for record, row in zip(read_labels(tmp_path / "labels", "label-regions", None), rows, strict=True):
        assert tuple(record["box"]) == row.box
        assert (record["image_width"], record["image_height"]) == row.load_image().size


class _Stopped(Exception):
    """As if the machine had gone away."""


def test_stopped_and_restarted_gives_the_same_labels(model, data, made, tmp_path, monkeypatch) -> None:
    called = []

    def stopping(self, rows, bad):
        called.append([row.id for row in rows])
        if len(called) == 2:
            raise _Stopped
        return original(self, rows, bad)

    original = RegionLabeler.__call__
    monkeypatch.setattr(RegionLabeler, "__call__", stopping)
    with pytest.raises(_Stopped):
        run(_config(model, data, tmp_path / "stopped"))
    assert len(list((tmp_path / "stopped").glob("*.parquet"))) == 1
    with pytest.raises(ValueError, match="2 of 3 shards are missing; run 'label-regions' again"):
        list(read_labels(tmp_path / "stopped", "label-regions", None))
    run(_config(model, data, tmp_path / "stopped"))
    assert [len(ids) for ids in called] == [4, 4, 4, 2], "the finished shard is not made again"
    assert _contents(tmp_path / "stopped") == _contents(made)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"max_new_tokens": 5}, "settings"),
        ({"sink_heads": {}}, "settings"),
        ({"max_tokens": 15}, "settings"),
        ({"limit": 9}, "rows, settings"),
    ],
)
def test_other_labels_do_not_get_mixed_in(model, data, made, changed, named) -> None:
    with pytest.raises(ValueError, match=f"whose {named} differ"):
        run(_config(model, data, made, **changed))


def test_unreadable_images_are_skipped_and_named(model, tmp_path, caplog) -> None:
    data = write_data(tmp_path / "data", images=4, questions=1)
    (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    run(_config(model, data, tmp_path / "labels"))
    assert [record["id"] for record in read_labels(tmp_path / "labels", "label-regions", None)] == [
        "0-0",
        "2-0",
        "3-0",
    ]
    assert "1 of 4 rows skipped" in caplog.text and "skipped 1-0" in caplog.text


def test_only_unreadable_images_are_an_error(model, tmp_path) -> None:
    data = write_data(tmp_path / "data", images=2, questions=1)
    for name in ("0.png", "1.png"):
        (tmp_path / "data" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0 usable rows and 2 unusable ones, such as 0-0: "):
        run(_config(model, data, tmp_path / "labels"))


def test_empty_responses_are_skipped_and_named(model, data, tmp_path) -> None:
    config = _config(model, data, tmp_path / "labels", max_new_tokens=1)
    labeler, bad = RegionLabeler(open_session(config), config), BadRows("test")
    assert labeler(drawn_rows("train", 1, 0), bad) == []
    assert "response is empty" in bad.skipped[0]


def test_heads_come_from_a_file_or_from_tables(model, data, tmp_path) -> None:
    with pytest.raises(ValueError, match="run find-heads"):
        run(_config(model, data, tmp_path / "labels", grounding_heads={}))
    heads = tmp_path / "heads.yaml"
    heads.write_text("grounding_heads: {3: [0]}\nquery_tokens: before\nbackbone: another\n")
    with pytest.raises(ValueError, match="exclude each other"):
        run(_config(model, data, tmp_path / "labels", heads=str(heads)))
    run(_config(model, data, tmp_path / "labels", heads=str(heads), grounding_heads={}, sink_heads={}))
    settings = read_manifest(tmp_path / "labels", "label-regions")["settings"]
    assert settings["grounding_heads"] == {"3": [0]} and settings["query_tokens"] == "before"
    heads.write_text("foreground: 0.2\n")
    with pytest.raises(ValueError, match="not a file of find-heads"):
        run(_config(model, data, tmp_path / "labels", heads=str(heads), grounding_heads={}, sink_heads={}))


def test_heads_that_the_model_lacks_are_named(model, data, tmp_path) -> None:
    with pytest.raises(ValueError, match="layer 9"):
        run(_config(model, data, tmp_path / "labels", sink_heads={9: [0]}))
    assert not (tmp_path / "labels").exists()


def _command(config: LabelRegionsConfig, launcher: list[str]) -> list[str]:
    names = ("model", "data", "output", "max_new_tokens", "batch_size", "shard_size", "min_tokens", "max_tokens")
    options = [f"{name}={getattr(config, name)}" for name in names]
    options += [f"{name}={json.dumps(table)}".replace('"', "") for name, table in HEADS.items()]
    return [*launcher, "-m", "modeling_qzoom.training", "label-regions", *options]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def test_the_command_line_says_the_same_as_the_tests(model, data, tmp_path) -> None:
    config = _config(model, data, tmp_path)
    options = _command(config, [])[3:]
    assert load_config(LabelRegionsConfig, None, options) == config


@pytest.mark.slow
def test_killed_and_restarted_gives_the_same_labels(model, tmp_path) -> None:
    data = write_data(tmp_path / "data", images=30)
    run(_config(model, data, tmp_path / "whole", shard_size=2))
    config = _config(model, data, tmp_path / "killed", shard_size=2)
    command = _command(config, [sys.executable])
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed"
    while process.poll() is None and not list(folder.glob("*.parquet")):
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(folder.glob("*.parquet")))
    assert 1 <= made < 30, "it has to be stopped in the middle"
    subprocess.run(command, cwd=ROOT, env=_environment(), check=True, capture_output=True)
    assert _contents(folder) == _contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_make_the_same_labels(model, data, made, tmp_path) -> None:
    config = _config(model, data, tmp_path / "two")
    launch = ROOT / "modeling_qzoom" / "training" / "configs" / "launch" / "ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    command = _command(config, [*launcher, "--num_processes", "2", "--main_process_port", "0"])
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # both loaded the model: one process would have made the same labels
    assert done.stderr.count("Loading weights: 100%") >= 2
    assert _contents(tmp_path / "two") == _contents(made)
