"""Labelling in batches: one row at fault costs that row alone."""

import pytest

from modeling_qzoom.data.bad_rows import BadRows
from modeling_qzoom.data.rows import Row
from modeling_qzoom.training.common.labelling import label_in_batches


def rows(count: int) -> list[Row]:
    return [Row(str(number), None, "?") for number in range(count)]


def load(row: Row) -> int:
    if row.id == "4":
        raise ValueError("row 4: cannot be read")
    return int(row.id)


def test_rows_at_fault_are_found_named_and_left_out() -> None:
    batches: list[list[int]] = []

    def label(batch: list[int]) -> list[int | str]:
        batches.append(batch)
        if 2 in batch:
            raise ValueError("refused")
        return ["says nothing" if number == 6 else 10 * number for number in batch]

    bad = BadRows("test")
    assert list(label_in_batches(rows(8), load, label, 3, bad)) == [0, 10, 30, 50, 70]
    assert batches == [[0, 1, 2], [0], [1], [2], [3, 5, 6], [7]]
    assert bad.skipped == ["2: refused", "4: cannot be read", "6: says nothing"]


@pytest.mark.parametrize("size", [1, 2, 8, 100])
def test_labels_do_not_depend_on_the_batch(size) -> None:
    bad = BadRows("test")
    labels = label_in_batches(rows(8), load, lambda batch: [number + 1 for number in batch], size, bad)
    assert list(labels) == [1, 2, 3, 4, 6, 7, 8] and len(bad.skipped) == 1


def test_other_errors_are_not_the_rows(caplog) -> None:
    def label(batch: list[int]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(label_in_batches(rows(2), load, label, 2, BadRows("test")))
