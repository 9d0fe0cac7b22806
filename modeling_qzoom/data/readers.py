"""Rows of (image, question[, answer]) from files, `datasets` or drawn pages; what is unusable is named and skipped."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .bad_rows import BadRows
from .config import DataConfig
from .rows import Row, Rows


DRAWN = "drawn:"
HUB = "hub:"


def _answers(value: Any) -> tuple[str, ...]:
    """Accepted answers of a cell: a text, a number or a list of them."""
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(item) for item in values if str(item).strip())


def _image_of(value: Any, folder: Path) -> Any:
    """A cell's image: `datasets` gives pictures, or bytes and path; files give paths."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and not value.startswith(("http://", "https://", "data:image/")):
        path = folder / value
        try:
            exists = path.is_file()
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise ValueError(f"the image {value[:80]!r} cannot be opened ({error.strerror})") from error
        if not exists:
            raise ValueError(f"there is no image {path}")
        return str(path)
    return value


def _image_name(value: Any, row_id: str) -> str:
    """What tells whether two rows are about one image."""
    if isinstance(value, dict):
        value = value.get("path") or row_id
    return value if isinstance(value, str) else row_id


def _row(record: Any, number: int, config: DataConfig, folder: Path, needs_answer: bool) -> Row:
    """A record as a row.

    Raises:
        ValueError: A field is missing or its image does not exist.
    """
    if not isinstance(record, dict):
        raise ValueError("is no mapping of names to values")
    wanted = [config.image_key, config.question_key] + ([config.answer_key] if needs_answer else [])
    missing = [key for key in wanted if record.get(key) in (None, "", [])]
    if missing:
        raise ValueError(f"lacks {missing}; it has {sorted(record)}")
    row_id = str(record.get(config.id_key, number))
    question = record[config.question_key]
    if not isinstance(question, str):
        raise ValueError(f"{config.question_key!r} is no text: {question!r}")
    image = _image_of(record[config.image_key], folder)
    image_id = _image_name(record[config.image_key], row_id)
    answers = _answers(record.get(config.answer_key))
    for text in (row_id, question, *answers):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} holds half a character (a surrogate)") from error
    return Row(row_id, image, question, answers, image_id)


def _json_lines(path: Path, bad: BadRows) -> Iterable[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    # "-sig": Windows editors begin a file with a mark
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    bad.add(f"{path.name}, line {number}", f"is no text in UTF-8 ({error.reason})")
                except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets in brackets
                    bad.add(f"{path.name}, line {number}", f"is no JSON ({error})")
                else:
                    yield f"line {number}", record


def _records(config: DataConfig, bad: BadRows) -> tuple[Iterable[tuple[str, Any]], Path]:
    """Records with their names, and the folder that their image paths are relative to.

    Raises:
        ValueError: There is no such file, or it is of no known kind.
        ImportError: The package that reads it is missing.
    """
    path = Path(config.data)
    folder = Path(config.images) if config.images else path.parent
    if config.images and not folder.is_dir():
        raise ValueError(f"images={config.images}: there is no such folder.")
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        return _json_lines(path, bad), folder
    if path.is_file() and path.suffix == ".parquet":
        return ((f"row {n}", record) for n, record in enumerate(read_parquet(path))), folder
    if config.data.startswith(HUB) or (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _dataset_records(_load_dataset(config), Path(config.data).name, bad), folder
    raise ValueError(
        f"data={config.data}: no JSONL or parquet file, no folder of datasets.save_to_disk, no '{HUB}NAME' and no "
        f"'{DRAWN}SPLIT'."
    )


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The records of a parquet file.

    Raises:
        ImportError: pyarrow is missing; the extra `train` installs it.
        ValueError: The file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'qzoom[train]'.") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _load_dataset(config: DataConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Datasets need the package datasets: pip install 'qzoom[train]'.") from error
    try:
        if config.data.startswith(HUB):
            return datasets.load_dataset(config.data.removeprefix(HUB), split=config.data_split)
        loaded = datasets.load_from_disk(config.data)
    except Exception as error:  # its own errors, and those of every format that it reads
        raise ValueError(f"data={config.data} cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if config.data_split not in loaded:
            raise ValueError(f"{config.data} has no split {config.data_split!r}; it has {sorted(loaded)}.")
        return loaded[config.data_split]
    return loaded


def _dataset_records(dataset: Any, source: str, bad: BadRows) -> Iterable[tuple[str, Any]]:
    """Records of a dataset one by one: it decodes images as it is read, and one of them may be damaged."""
    for number in range(len(dataset)):
        try:
            record = dataset[number]
        except (OSError, ValueError) as error:
            bad.add(f"{source}, row {number}", str(error))
            continue
        yield f"row {number}", record


@dataclass(frozen=True)
class _DrawnImage:
    """Draws its page again each time, so that thousands of rows fit in memory."""

    split: str
    seed: int
    kind: str

    def __call__(self) -> Image.Image:
        from .drawn.questions import draw_page

        return draw_page(self.seed, kind=self.kind, split=self.split).image


def drawn_rows(split: str, count: int, seed: int) -> Rows:
    """Rows about benchmark pages: every page with two questions about details and two that need none.

    Args:
        count: Number of rows.
        seed: Other seeds give other pages.
    """
    from .drawn.questions import PAGE_KINDS, ask_question, draw_page

    rows: list[Row] = []
    number = 0
    while len(rows) < count:
        # far above the seeds of evaluation rows, in case both use one split
        page_seed = 10**15 + seed * 10**7 + number
        kind = PAGE_KINDS[number % len(PAGE_KINDS)]
        number += 1
        page = draw_page(page_seed, kind=kind, split=split)
        rng = random.Random(f"rows/{split}/{page_seed}")
        asked = {}
        for question_kind in ("fine", "coarse", "fine", "coarse"):
            question = ask_question(page, question_kind, rng)
            asked[question.text] = question
        for place, question in enumerate(asked.values()):
            name = f"{split}-{page_seed}"
            image = _DrawnImage(split, page_seed, kind)
            row = Row(f"{name}-{place}", image, question.text, (question.answer,), name, question.box, question.kind)
            rows.append(row)
    return Rows(rows[:count], f"drawn/{split}/{count}/{seed}")


def load_rows(config: DataConfig, needs_answer: bool = False) -> Rows:
    """The rows of a configuration.

    Args:
        needs_answer: Rows without an answer are unusable.

    Raises:
        ValueError: The data does not exist, is empty, or more rows are unusable than not.
    """
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit must be at least 1, got {config.limit}.")
    if config.data.startswith(DRAWN):
        return drawn_rows(config.data.removeprefix(DRAWN), config.limit or 1000, config.seed)
    bad, rows, digest = BadRows(config.data), [], hashlib.sha256()
    seen: set[str] = set()
    records, folder = _records(config, bad)
    for number, (name, record) in enumerate(records):
        try:
            row = _row(record, number, config, folder, needs_answer)
            if row.id in seen:
                raise ValueError(f"the id {row.id!r} occurs twice")
        except ValueError as error:
            bad.add(f"{Path(config.data).name}, {name}", str(error))
            continue
        seen.add(row.id)
        rows.append(row)
    bad.check(len(rows))
    if config.limit is not None and config.limit < len(rows):
        chosen = sorted(random.Random(config.seed).sample(range(len(rows)), config.limit))
        rows = [rows[index] for index in chosen]
    for row in rows:
        digest.update(f"{row.id}\0{row.question}\0{row.answers}\0".encode())
    return Rows(rows, digest.hexdigest())
