"""Rows of (image, question[, answer]) from the records of files, or drawn."""

import hashlib
import random
from pathlib import Path
from typing import cast

from .bad_rows import BadRows
from .config import DataConfig
from .drawn.rows import drawn_rows
from .records import DRAWN, read_records
from .rows import ImageSource, Row, Rows


def _answers(value: object) -> tuple[str, ...]:
    """Accepted answers of a cell: a text, a number or a list of them."""
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(item) for item in values if str(item).strip())


def _image_of(value: object, folder: Path) -> ImageSource:
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
    return cast(ImageSource, value)  # anything else is refused when the row's image is loaded


def _image_name(value: object, row_id: str) -> str:
    """What tells whether two rows are about one image."""
    if isinstance(value, dict):
        value = value.get("path") or row_id
    return value if isinstance(value, str) else row_id


def _row(record: object, number: int, config: DataConfig, folder: Path, needs_answer: bool) -> Row:
    """A record as a row.

    Raises:
        ValueError: a field is missing or its image does not exist.
    """
    if not isinstance(record, dict):
        raise ValueError("is no mapping of names to values")
    names = [config.image_key, config.question_key] + ([config.answer_key] if needs_answer else [])
    missing = [key for key in names if record.get(key) in (None, "", [])]
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


def load_rows(config: DataConfig, needs_answer: bool = False) -> Rows:
    """The rows that a configuration names: drawn, or read from a file; what is unusable is named and skipped.

    Args:
        config: which data, and the names of its columns.
        needs_answer: whether rows without an answer are unusable.

    Raises:
        ValueError: the data does not exist, is empty, or more rows are unusable than not.
    """
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit must be at least 1, got {config.limit}.")
    if config.data.startswith(DRAWN):
        split, slash, pages = config.data.removeprefix(DRAWN).partition("/")
        return drawn_rows(split, config.limit or 1000, config.seed, pages if slash else "plain")
    bad, rows, digest = BadRows(config.data), [], hashlib.sha256()
    seen: set[str] = set()
    records, folder = read_records(config, bad)
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
        places = sorted(random.Random(config.seed).sample(range(len(rows)), config.limit))
        rows = [rows[index] for index in places]
    for row in rows:
        digest.update(f"{row.id}\0{row.question}\0{row.answers}\0".encode())
    return Rows(rows, digest.hexdigest())
