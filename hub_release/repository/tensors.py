"""What a repository's weight files hold, read from their headers. Standard library only."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hub_release.repository.errors import BuildError
from hub_release.repository.files import read_json


_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's entry in a safetensors file.

    Attributes:
        dtype: name of the type in the file, e.g. "BF16".
        shape: shape of the tensor.
        file: name of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: (item["dtype"], tuple(item["shape"]), item["data_offsets"]) for name, item in header.items()}
        end = max((offsets[1] for _, _, offsets in tensors.values()), default=0)
    except (ValueError, OverflowError, MemoryError, TypeError, KeyError, AttributeError) as error:
        raise BuildError(f"{path} is not a safetensors file: {error}") from error
    if path.stat().st_size != 8 + length + end:
        raise BuildError(f"{path} is cut off or damaged: {path.stat().st_size} bytes instead of {8 + length + end}.")
    return {name: StoredTensor(dtype, shape, path.name) for name, (dtype, shape, _) in tensors.items()}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors in the folder's safetensors files, by name; only headers are read.

    Raises:
        BuildError: no weights, a listed file is missing or damaged, or the index says something else than the files.
    """
    index_path = folder / "model.safetensors.index.json"
    index = read_json(index_path).get("weight_map") if index_path.exists() else None
    if index is not None and not isinstance(index, dict):
        raise BuildError(f"{index_path} holds no weight_map.")
    files = ["model.safetensors"] if index is None else sorted(set(index.values()))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        path = folder / file
        if not path.exists():
            raise BuildError(f"{folder} has no weights ({file} is missing); train or convert a checkpoint first.")
        tensors |= _read_header(path)
    if index is not None and index != {name: tensor.file for name, tensor in tensors.items()}:
        raise BuildError(f"{index_path} and the files that it lists hold different tensors.")
    return tensors


def tensor_bytes(tensors: dict[str, StoredTensor]) -> int:
    """Size of the tensors' values."""
    return sum(prod(tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 1) for tensor in tensors.values())


def variant_of(config: dict[str, Any], tensors: dict[str, StoredTensor]) -> str:
    """Which kind of repository this is: "addon" (branches only), "4bit", "8bit" or "full"."""
    if tensors and all(name.startswith(("zoom.", "visor.")) for name in tensors):
        return "addon"
    recipe = config.get("quantization_config")
    if not recipe:
        return "full"
    return "4bit" if recipe.get("load_in_4bit") else "8bit"
