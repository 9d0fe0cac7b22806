"""Records of files: JSON lines, parquet and folders of `datasets`; what cannot be read is named and skipped."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bad_rows import BadRows
from .config import DataConfig
from .extras import needed_for


if TYPE_CHECKING:
    from datasets import Dataset

DRAWN = "drawn:"
HUB = "hub:"

# a name for messages, and what a line or a row of the data holds: usually a mapping, but a line may hold anything
NamedRecord = tuple[str, object]


def _json_lines(path: Path, bad: BadRows) -> Iterable[NamedRecord]:
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


def read_records(config: DataConfig, bad: BadRows) -> tuple[Iterable[NamedRecord], Path]:
    """Records with their names, and the folder that their image paths are relative to.

    Raises:
        ValueError: there is no such file, or it is of no known kind.
        ImportError: the package that reads it is missing.
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
        ImportError: pyarrow is missing; the extra `stages` installs it.
        ValueError: the file is damaged.
    """
    with needed_for("Parquet files need pyarrow"):
        import pyarrow
        from pyarrow import parquet
    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _load_dataset(config: DataConfig) -> "Dataset":
    with needed_for("Datasets need the package datasets"):
        import datasets
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


def _dataset_records(dataset: "Dataset", source: str, bad: BadRows) -> Iterable[NamedRecord]:
    """Records of a dataset one by one: it decodes images as it is read, and one of them may be damaged."""
    for number in range(len(dataset)):
        try:
            record = dataset[number]
        except (OSError, ValueError) as error:
            bad.add(f"{source}, row {number}", str(error))
            continue
        yield f"row {number}", record
