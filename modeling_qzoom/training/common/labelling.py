"""Labels rows in batches; where a batch fails, finds the row at fault and goes on without it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from PIL import Image

from ...asking.session import Session
from ...data.bad_rows import BadRows
from ...data.rows import Row


class LabelRecord(Protocol):
    """The label of a row."""

    def to_row(self) -> dict[str, Any]:
        """The record by the columns of its file."""
        ...


Loaded = TypeVar("Loaded")
Label = TypeVar("Label")
Record = TypeVar("Record", bound=LabelRecord)


def label_in_batches(
    rows: Iterable[Row],
    load: Callable[[Row], Loaded],
    label: Callable[[list[Loaded]], Sequence[Label | str]],
    size: int,
    bad: BadRows,
) -> Iterator[Label]:
    """Labels of the usable rows, in order; no more than one batch is held.

    Args:
        rows: any iterable.
        load: makes of a row what `label` takes.
        label: makes of a batch a label for each, or a sentence that says why it has none.
        size: rows per batch; the last one is shorter.
        bad: takes rows that `load`, or `label` on them alone, refuses with a ValueError.
    """
    batch: list[tuple[Row, Loaded]] = []
    for row in rows:
        try:
            batch.append((row, load(row)))
        except ValueError as error:
            bad.add(row.id, str(error).removeprefix(f"row {row.id}: "))
        if len(batch) == size:
            yield from _labels(batch, label, bad)
            batch = []
    if batch:
        yield from _labels(batch, label, bad)


def _labels(
    batch: list[tuple[Row, Loaded]], label: Callable[[list[Loaded]], Sequence[Label | str]], bad: BadRows
) -> Iterator[Label]:
    """Labels of a batch or, where it fails, of its rows one by one."""
    try:
        labels = label([loaded for _, loaded in batch])
    except ValueError as error:
        if len(batch) == 1:
            bad.add(batch[0][0].id, str(error))
            return
        for entry in batch:
            yield from _labels([entry], label, bad)
        return
    for (row, _), made in zip(batch, labels, strict=True):
        if isinstance(made, str):
            bad.add(row.id, made)
        else:
            yield made


class Labeler(ABC, Generic[Loaded, Record]):
    """Labels the rows of a shard.

    Args:
        session: the model.
        batch_size: rows per forward pass.
    """

    def __init__(self, session: Session, batch_size: int) -> None:
        self.session, self.batch_size = session, batch_size
        self._image: tuple[str, Image.Image] | None = None

    @abstractmethod
    def load(self, row: Row) -> Loaded:
        """What `label` takes of a row.

        Raises:
            ValueError: the row cannot be used.
        """

    @abstractmethod
    def label(self, batch: list[Loaded]) -> Sequence[Record | str]:
        """A record for each row of a batch, or a sentence that says why it has none.

        Raises:
            ValueError: a row of the batch cannot be used.
        """

    def image_of(self, row: Row) -> Image.Image:
        """The row's image; rows about one image that follow each other share it.

        Raises:
            ValueError: it cannot be read.
        """
        if self._image is None or self._image[0] != row.image_id or not row.image_id:
            self._image = row.image_id, row.load_image(self.session.processor.max_source_pixels)
        return self._image[1]

    def __call__(self, rows: Sequence[Row], bad: BadRows) -> list[dict[str, Any]]:
        """The usable rows' records by the columns of their file, in order."""
        records = label_in_batches(rows, self.load, self.label, self.batch_size, bad)
        return [record.to_row() for record in records]
