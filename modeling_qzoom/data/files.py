"""Files that commands keep in their folders: written whole or not at all, and named where they are damaged."""

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file; it takes its name, and the place of an older one, once it is written to its end."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; a reader never sees half of it."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON; a reader never sees half of it."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path, way_out: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping from a JSON file.

    Args:
        path: the file.
        way_out: what to do where the file is damaged, as the end of the error's sentence.
        names: names that the mapping has to hold.

    Raises:
        ValueError: the file cannot be read, is no JSON, no mapping, or lacks a name.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {way_out}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of names to values; {way_out}.")
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {missing}; {way_out}.")
    return values


def damage_of(path: Path) -> str | None:
    """What is wrong with a file of a checkpoint, without reading its tensors; None where it looks whole."""
    try:
        if path.suffix in (".json", ".jinja"):
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                json.loads(text)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares the file's length with its table of contents
                pass
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path):  # the table of contents is at the end
                pass
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{path} is damaged or cut short: {error}"
    return None


@contextmanager
def damage_named(model: str | Path) -> Iterator[None]:
    """Turns what loading a model raises into an error that names the model, and the damaged file if there is one.

    Raises:
        ValueError: whatever went wrong with its files.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        files = sorted(path for path in Path(model).glob("*") if path.is_file())
        damage = next(filter(None, map(damage_of, files)), None)
        why = str(error) if damage is None else f"{damage}; fetch or save it again"
        raise ValueError(f"model={model}: {why}") from error


def check_output_file(path: str | Path, name: str) -> None:
    """Finds out before a long run that its result could not be written.

    Args:
        path: the file that will be written.
        name: name of the option that asks for it.

    Raises:
        ValueError: the path is a folder, lies below a file, or may not be written.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise ValueError(f"{name}={path} is a folder; name a file.")
    nearest = next(folder for folder in target.parents if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"{name}={path}: {nearest} is no folder.")
    if not os.access(target if target.exists() else nearest, os.W_OK):
        raise ValueError(f"{name}={path} may not be written.")
