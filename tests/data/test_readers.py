"""Rows from files, datasets and drawn pages, and what happens to rows that cannot be used."""

import json
from pathlib import Path

import pytest
from PIL import Image

from modeling_qzoom.data.bad_rows import BadRows
from modeling_qzoom.data.config import DataConfig
from modeling_qzoom.data.drawn.questions import draw_page
from modeling_qzoom.data.drawn.rows import drawn_rows
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.data.rows import Row, by_image
from tests.processing_fixtures import noise


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in "abc":
        noise(20, 10, ord(name)).save(tmp_path / f"{name}.png")
    return tmp_path


def _write(folder: Path, records: list, name: str = "rows.jsonl") -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def _records(count: int = 3) -> list[dict]:
    return [{"image": f"{'abc'[n % 3]}.png", "question": f"q{n}?", "answer": f"a{n}"} for n in range(count)]


def test_json_lines(folder) -> None:
    rows = load_rows(
        DataConfig(data=_write(folder, [*_records(), "", {**_records()[0], "id": "own", "answer": [1, "x"]}]))
    )
    assert [row.id for row in rows] == ["0", "1", "2", "own"]
    assert rows[0].answers == ("a0",) and rows[3].answers == ("1", "x")
    assert rows[0].image_id == rows[3].image_id != rows[1].image_id
    assert rows[0].load_image().size == (20, 10)


def test_parquet_with_encoded_images(folder) -> None:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    table = Dataset.from_dict({"picture": [str(folder / "a.png"), str(folder / "b.png")], "ask": ["q?", "r?"]})
    table = table.cast_column("picture", ImageFeature())
    config = {"image_key": "picture", "question_key": "ask"}
    table.to_parquet(folder / "rows.parquet")
    table.save_to_disk(folder / "saved")
    for data in ("rows.parquet", "saved"):
        rows = load_rows(DataConfig(data=str(folder / data), **config))
        assert [row.question for row in rows] == ["q?", "r?"] and rows[0].answers == ()
        assert rows[1].load_image().tobytes() == Image.open(folder / "b.png").tobytes()


def test_splits_of_a_dataset(folder) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"dev": Dataset.from_list(_records(2))}).save_to_disk(folder / "saved")
    config = DataConfig(data=str(folder / "saved"), images=str(folder), data_split="dev")
    assert len(load_rows(config)) == 2
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['dev'\]"):
        load_rows(DataConfig(data=str(folder / "saved"), images=str(folder)))


def test_images_may_lie_elsewhere(folder, tmp_path_factory) -> None:
    data = _write(tmp_path_factory.mktemp("lists"), _records())
    assert len(load_rows(DataConfig(data=data, images=str(folder)))) == 3
    with pytest.raises(ValueError, match="0 usable rows"):
        load_rows(DataConfig(data=data))
    with pytest.raises(ValueError, match="there is no such folder"):
        load_rows(DataConfig(data=data, images=str(folder / "none")))


def test_bad_rows_are_skipped_counted_and_named(folder, caplog) -> None:
    bad = [
        "{not json",
        [1, 2],
        {"image": "a.png", "text": "no question"},
        {"image": "a.png", "question": 7},
        {"image": "missing.png", "question": "q?"},
        {"id": "0", "image": "a.png", "question": "again?"},
    ]
    rows = load_rows(DataConfig(data=_write(folder, [*_records(6), *bad])))
    assert len(rows) == 6 and "6 of 12 rows skipped" in caplog.text
    for message in ("line 7: is no JSON", "lacks ['question']; it has ['image', 'text']", "there is no image"):
        assert message in caplog.text


def test_more_bad_than_good_rows_are_an_error(folder) -> None:
    bad = [{"image": "a.png"}] * 4
    with pytest.raises(ValueError, match=r"3 usable rows and 4 unusable ones, such as rows.jsonl, line 4: lacks"):
        load_rows(DataConfig(data=_write(folder, [*_records(), *bad])))
    with pytest.raises(ValueError, match="0 usable rows and 0 unusable ones: it is empty"):
        load_rows(DataConfig(data=_write(folder, [])))


def test_rows_without_an_answer_count_only_where_it_is_needed(folder) -> None:
    records = [*_records(), {"image": "a.png", "question": "q?"}, {"image": "a.png", "question": "r?", "answer": ""}]
    data = DataConfig(data=_write(folder, records))
    assert len(load_rows(data)) == 5 and len(load_rows(data, needs_answer=True)) == 3


def test_unknown_data(folder) -> None:
    with pytest.raises(ValueError, match="no JSONL or parquet file"):
        load_rows(DataConfig(data=str(folder / "none.jsonl")))
    (folder / "rows.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        load_rows(DataConfig(data=str(folder / "rows.parquet")))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_rows(DataConfig(data=_write(folder, _records()), limit=0))


def test_a_limit_draws_rows_and_the_fingerprint_tells_them_apart(folder) -> None:
    data = _write(folder, _records(30))
    whole, same = (load_rows(DataConfig(data=data)) for _ in range(2))
    first, again, other = (load_rows(DataConfig(data=data, limit=5, seed=seed)) for seed in (0, 0, 1))
    assert len(first) == 5 and [row.id for row in first] == [row.id for row in again] != [row.id for row in other]
    assert whole.fingerprint == same.fingerprint and first.fingerprint == again.fingerprint
    assert len({whole.fingerprint, first.fingerprint, other.fingerprint}) == 3
    assert [int(row.id) for row in first] == sorted(int(row.id) for row in first)


def test_unreadable_images_name_their_row() -> None:
    with pytest.raises(ValueError, match="row seven: .*"):
        Row("seven", b"no picture", "q?").load_image()
    with pytest.raises(ValueError, match="row big: .*max_source_pixels"):
        Row("big", noise(20, 10), "q?").load_image(max_pixels=100)


def test_drawn_rows() -> None:
    rows = drawn_rows("train", 10, seed=3)
    assert len(rows) == 10 and len({row.id for row in rows}) == 10
    groups = by_image(rows, lambda row: row.image_id)
    assert all({"fine", "coarse"} == {row.kind for row in group} for group in groups[:-1])
    page = rows[0].load_image()
    assert page.tobytes() == rows[1].load_image().tobytes() and rows[0].image_id == rows[1].image_id
    left, top, right, bottom = rows[0].box
    assert 0 <= left < right <= page.width and 0 <= top < bottom <= page.height
    assert [row.id for row in drawn_rows("train", 4, seed=3)] == [row.id for row in rows[:4]]
    assert {row.image_id for row in drawn_rows("train", 10, seed=4)}.isdisjoint(row.image_id for row in rows)
    with pytest.raises(ValueError, match="no split 'training'"):
        load_rows(DataConfig(data="drawn:training"))


def test_drawn_rows_ask_about_what_is_on_the_page() -> None:
    row = next(row for row in drawn_rows("validation", 4, seed=0) if row.kind == "fine")
    split, seed = row.image_id.split("-")
    page = draw_page(int(seed), kind="scene", split=split)
    assert (row.answers[0], row.box) in [(entry.code, entry.code_box) for entry in page.entries]


def test_bad_rows_are_logged_a_few_times_only(caplog) -> None:
    bad = BadRows("rows.jsonl")
    for number in range(20):
        bad.add(f"row {number}", "is bad")
    assert caplog.text.count("is bad") == 5
    bad.check(20)
    assert "20 of 40 rows skipped" in caplog.text
    with pytest.raises(ValueError, match="19 usable rows and 20 unusable ones"):
        bad.check(19)
