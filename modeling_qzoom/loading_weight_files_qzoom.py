"""Weight files: what is in them, and which of them is damaged, read from the headers alone."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from .errors_qzoom import CheckpointError


WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_AGAIN = "Download or save it again."


def _header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """A safetensors file's entries by tensor, and the bytes that the file should have.

    Raises:
        CheckpointError: no header can be read; the message says why.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise CheckpointError("it is a Git LFS pointer instead of the weights; fetch them with `git lfs pull`.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(f"it is cut short, or no safetensors file. {_AGAIN}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"it is no safetensors file. {_AGAIN}") from error
    return header, 8 + length + end


def tensor_names(path: str | os.PathLike[str], *, whole: bool = True) -> list[str]:
    """Names of the tensors in a safetensors file.

    Args:
        whole: also check that the file is as long as it should be.

    Raises:
        CheckpointError: the file is missing or damaged; names it, and says what to do.
    """
    try:
        header, expected = _header(path)
        size = os.path.getsize(path)
        if whole and size != expected:
            kind = "cut short" if size < expected else "too long"
            raise CheckpointError(f"it is {kind}, {size} bytes instead of {expected}. {_AGAIN}")
    except OSError as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {error.strerror or error}. {_AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from error
    return list(header)


def files_in_index(path: str | os.PathLike[str]) -> list[str]:
    """Names of the files that an index of sharded weights lists.

    Raises:
        CheckpointError: the index is damaged.
    """
    try:
        return sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the index of the weights, {path}, cannot be read: {error!r}. {_AGAIN}") from error


def check_weight_files(files: list[str] | None) -> None:
    """Checks weight files by their headers.

    Raises:
        CheckpointError: one of the safetensors files is missing or damaged; names it.
    """
    for file in files or ():
        if str(file).endswith(".safetensors"):
            tensor_names(file)


def _check_model(name: str, subfolder: str, **hub: Any) -> None:
    """Checks the files of a model or an adapter as far as they are on this machine."""

    def find(file: str) -> str | None:
        try:
            return cached_file(
                name,
                file,
                subfolder=subfolder,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                **hub,
            )
        except OSError:
            return None

    index = find(INDEX)
    folder = None if index is None else os.path.dirname(index)
    shards = (
        [] if index is None or find(WEIGHTS) else [os.path.join(folder or "", file) for file in files_in_index(index)]
    )
    check_weight_files([file for file in map(find, (WEIGHTS, ADAPTER_WEIGHTS)) if file is not None] + shards)


@contextlib.contextmanager
def damage_named(*names: str | os.PathLike[str] | None, subfolder: str = "", **hub: Any) -> Iterator[None]:
    """Where loading fails within, looks whether a file is damaged, and says which.

    Args:
        names: repositories or folders that are read.
        hub: `revision`, `cache_dir` and `token`, as for `from_pretrained`.

    Raises:
        CheckpointError: names the file.
    """
    try:
        yield
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        for name in names:
            if name is not None:
                _check_model(os.fspath(name), subfolder, **hub)
        raise
