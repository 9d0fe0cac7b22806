"""Records of labels: what is written is what is read, by columns that do not change."""

from pathlib import Path

import numpy as np
import pytest

from modeling_qzoom.data.records import read_parquet
from modeling_qzoom.training.common.label_store import write_shard
from modeling_qzoom.training.fusion.record import FusionRecord
from modeling_qzoom.training.gate.record import GateRecord
from modeling_qzoom.training.regions.record import RegionRecord


MAP = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
REGION = RegionRecord(
    "0", "page", "what?", ("a", "b"), "a", MAP, MAP * 0, (1, 2, 3, 4), (90, 60), (0.0, 0.5, 3.0, 1.5)
)
FUSION = FusionRecord("0", "what?", ("a",), "a", "b", True, False, (1, 2, 3, 4))
GATE = GateRecord("0", "page", "what?", ("a",), [4, 9], ["x", "a"], [False, True], [False, True])
COLUMNS = {
    "region": "id image_id question answers response height width grounding sinks "
    "box image_width image_height content",
    "fusion": "id question answers plain zoomed plain_right zoomed_right regression box",
    "gate": "id image_id question answers ladder replies right agrees",
}


@pytest.mark.parametrize("name, record", [("region", REGION), ("fusion", FUSION), ("gate", GATE)])
def test_a_record_comes_back_from_its_file(name, record, tmp_path: Path) -> None:
    write_shard(tmp_path / "labels.parquet", [record.to_row()], [])
    (row,) = read_parquet(tmp_path / "labels.parquet")
    assert list(row) == COLUMNS[name].split()
    again = type(record).from_row(row)
    for field, value in vars(record).items():
        assert np.array_equal(getattr(again, field), value), field
        assert type(getattr(again, field)) is type(value), field


def test_what_rows_lack_is_none(tmp_path: Path) -> None:
    gate = GateRecord("0", "page", "what?", (), [4, 9], ["x", "a"], None, [False, True])
    write_shard(tmp_path / "gate.parquet", [gate.to_row()], [])
    assert GateRecord.from_row(read_parquet(tmp_path / "gate.parquet")[0]) == gate
    region = RegionRecord("0", "page", "what?", (), "a", MAP, MAP * 0)
    write_shard(tmp_path / "region.parquet", [region.to_row()], [])
    again = RegionRecord.from_row(read_parquet(tmp_path / "region.parquet")[0])
    assert (again.box, again.image_size, again.content, again.grid) == (None, None, None, (2, 3))


def test_region_labels_without_the_last_columns_are_read() -> None:
    row = {name: value for name, value in REGION.to_row().items() if name not in ("box", "content", "image_width")}
    assert RegionRecord.from_row(row).content is None


def test_a_regression_is_a_right_answer_made_wrong() -> None:
    cases = [(True, False), (True, True), (False, True), (False, False)]
    records = [FusionRecord("0", "?", ("a",), "a", "b", *case, None) for case in cases]
    assert [record.regression for record in records] == [True, False, False, False]
