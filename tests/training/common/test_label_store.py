"""Shards of labels: written whole or not at all, each row in exactly one of them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from modeling_qzoom.data.records import read_parquet
from modeling_qzoom.data.rows import Row, Rows
from modeling_qzoom.training.common.label_store import (
    Manifest,
    ShardStore,
    make_labels,
    read_labels,
    read_manifest,
    write_shard,
)


MANIFEST = Manifest("stage", "backbone", "rows", {"heads": {22: [1, 4]}, "sides": (1, 2)})


def _rows(count: int = 10) -> Rows:
    return Rows([Row(str(number), "image.png", "q?") for number in range(count)], "rows")


def _label(rows, bad) -> list[dict]:
    """Rows 3 and 7 cannot be used."""
    for row in rows:
        if row.id in ("3", "7"):
            bad.add(row.id, "is bad")
    return [
        {"id": row.id, "map": np.full(3, int(row.id), dtype=np.float32)} for row in rows if row.id not in ("3", "7")
    ]


def _ids(folder: Path) -> list[str]:
    return [record["id"] for record in read_labels(folder, "stage", "backbone")]


@pytest.mark.parametrize("shard_size", [1, 3, 10, 100])
def test_every_row_is_labelled_once_and_in_order(tmp_path, shard_size) -> None:
    make_labels(tmp_path, MANIFEST, _rows(), shard_size, _label)
    assert _ids(tmp_path) == list("01245689")
    assert len(list(tmp_path.glob("*.parquet"))) == -(-10 // shard_size)
    assert [record["map"] for record in read_labels(tmp_path, "stage", None)][4] == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_the_shards(tmp_path, world) -> None:
    store = ShardStore(tmp_path, MANIFEST, 4)
    for rank in reversed(range(world)):
        store.make(_rows(), 3, _label, rank, world)
    assert _ids(tmp_path) == list("01245689")
    assert [line.split(":")[0] for line in store.skipped()] == ["3", "7"]


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_stop_anywhere_loses_and_doubles_nothing(tmp_path, stop) -> None:
    made: list[str] = []

    def label(rows, bad):
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(rows[0].id)
        return _label(rows, bad)

    if stop < 4:
        with pytest.raises(KeyboardInterrupt):
            make_labels(tmp_path, MANIFEST, _rows(), 3, label)
    made.clear()
    stop = 10
    make_labels(tmp_path, MANIFEST, _rows(), 3, label)
    assert _ids(tmp_path) == list("01245689")
    assert "0" not in made or len(made) == 4


def test_half_a_shard_is_no_shard(tmp_path, monkeypatch) -> None:
    from pyarrow import parquet

    def torn(table, where):
        Path(where).write_bytes(b"PAR1 half a")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", torn)
        with pytest.raises(OSError, match="no space left"):
            make_labels(tmp_path, MANIFEST, _rows(), 5, _label)
    assert not list(tmp_path.glob("*.parquet"))
    make_labels(tmp_path, MANIFEST, _rows(), 5, _label)
    assert _ids(tmp_path) == list("01245689")
    assert not list(tmp_path.glob("*.partial"))


def test_without_pyarrow_no_row_is_labelled(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"need pyarrow: pip install 'qzoom\[stages\]'"):
        make_labels(tmp_path / "labels", MANIFEST, _rows(), 5, lambda *_: pytest.fail("labelled"))
    assert not (tmp_path / "labels").exists()


def test_a_shard_without_a_usable_row(tmp_path) -> None:
    write_shard(tmp_path / "one.parquet", [], ["7: is bad"])
    assert read_parquet(tmp_path / "one.parquet") == []
    make_labels(tmp_path, MANIFEST, _rows(), 1, _label)
    assert _ids(tmp_path) == list("01245689")


def test_more_bad_rows_than_good_ones_are_an_error(tmp_path) -> None:
    def label(rows, bad):
        for row in rows:
            bad.add(row.id, "has no image")
        return []

    for _ in range(2):  # the second time all shards exist
        with pytest.raises(ValueError, match="0 usable rows and 10 unusable ones, such as 0: has no image"):
            make_labels(tmp_path, MANIFEST, _rows(), 5, label)


@pytest.mark.parametrize(
    ("other", "size", "named"),
    [
        (Manifest("another", "backbone", "rows", MANIFEST.settings), 5, "stage"),
        (Manifest("stage", "another", "rows", MANIFEST.settings), 5, "backbone"),
        (Manifest("stage", "backbone", "others", MANIFEST.settings), 5, "rows"),
        (Manifest("stage", "backbone", "rows", {"heads": {22: [1]}, "sides": (1, 2)}), 5, "settings"),
        (MANIFEST, 6, "settings"),  # also two shards, but with other bounds
    ],
)
def test_labels_of_something_else_stay_apart(tmp_path, other, size, named) -> None:
    make_labels(tmp_path, MANIFEST, _rows(), 5, _label)
    with pytest.raises(ValueError, match=f"holds labels whose {named} differ"):
        make_labels(tmp_path, other, _rows(), size, _label)
    make_labels(tmp_path, MANIFEST, _rows(), 5, _label)


def test_reading_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(ValueError, match="there are no labels; make them with the stage 'stage'"):
        read_manifest(tmp_path, "stage")
    make_labels(tmp_path, MANIFEST, _rows(), 2, _label)
    with pytest.raises(ValueError, match="labels of 'stage', this stage needs those of 'other'"):
        read_manifest(tmp_path, "other")
    with pytest.raises(ValueError, match="made by another backbone"):
        list(read_labels(tmp_path, "stage", "another"))
    (tmp_path / "labels-00003-of-00005.parquet").unlink()
    with pytest.raises(ValueError, match="1 of 5 shards are missing; run 'stage' again"):
        list(read_labels(tmp_path, "stage", None))


def test_the_manifest_is_readable_by_people(tmp_path) -> None:
    make_labels(tmp_path, MANIFEST, _rows(), 5, _label)
    held = json.loads((tmp_path / "labels.json").read_text())
    assert held["settings"] == {"heads": {"22": [1, 4]}, "sides": [1, 2], "shard_size": 5} and held["shards"] == 2
