"""What a published folder consists of, read without loading it: files, code, tensors. Standard library only."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_qzoom"
MODEL_CLASS = "modeling_qzoom.QZoomForConditionalGeneration"
# the classes that each of these files has to name
AUTO_MAPS: dict[str, dict[str, str]] = {
    "config.json": {
        "AutoConfig": "configuration_qzoom.QZoomConfig",
        "AutoModel": MODEL_CLASS,
        "AutoModelForImageTextToText": MODEL_CLASS,
        "AutoModelForMultimodalLM": MODEL_CLASS,
    },
    "processor_config.json": {"AutoProcessor": "processing_qzoom.QZoomProcessor"},
}
CODE_ROOTS = ("configuration_qzoom", "modeling_qzoom", "processing_qzoom")
LICENCE_FILES = ("LICENSE", "NOTICE")
BASE_LICENCE = "BASE_"
"""What the names of the base model's licence files begin with."""
EVALUATION = "evaluation"
"""Folder of the figures that the card states."""
FIGURE_KINDS = ("figures", "shifted", "seeds", "times")
REQUIRED = (
    "README.md",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    *LICENCE_FILES,
)
_LICENCE_NAME = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)[\w.-]*", re.IGNORECASE)
_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
WEIGHT_FILES = re.compile(rf"{_WEIGHTS}|lora/adapter_config\.json|lora/adapter_model\.safetensors")
# data that transformers reads, and what a reader looks at; code is listed by who imports it
_DATA = re.compile(
    rf"{WEIGHT_FILES.pattern}"
    r"|README\.md|\.gitattributes|LICENSE|NOTICE"
    rf"|{BASE_LICENCE}{_LICENCE_NAME.pattern}"
    r"|(config|generation_config|processor_config|preprocessor_config|video_preprocessor_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|chat_template\.jinja|additional_chat_templates/[\w-]+\.jinja|merges\.txt|tokenizer\.model"
    rf"|{EVALUATION}/({'|'.join(FIGURE_KINDS)})\.json"
    r"|assets/[\w.-]+\.(png|jpg|webp)",
)
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


VERSION_FIELD = "qzoom_version"
"""Field of config.json for the version of the package that a repository's code is from."""


class BuildError(ValueError):
    """A checkpoint or a folder is not what it should be; the message says what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BuildError: missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BuildError(f"{path} holds no JSON object.")
    return content


def is_data(name: str) -> bool:
    """Whether a file of this path inside a repository is data that belongs there."""
    return _DATA.fullmatch(name) is not None


def is_licence(name: str) -> bool:
    """Whether a model's repository keeps its licence terms in a file of this name."""
    return _LICENCE_NAME.fullmatch(name) is not None


def is_repository(name: str | None) -> bool:
    """Whether a base model's name is one that others can reach: OWNER/NAME on the Hub, and no path."""
    return name is not None and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is not None


def files_of(folder: Path) -> list[str]:
    """Paths of all files inside a folder, links included, sorted, with forward slashes."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


# --- code ------------------------------------------------------------------------------------------------------------


def relative_imports(source: str, name: str) -> Iterator[str]:
    """Modules beside a published file that it imports.

    Raises:
        BuildError: an import that transformers does not follow.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                raise BuildError(f"{name}.py: a published file may only import modules beside it by name.")
            yield node.module


def code_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Follows the imports from the published classes' files.

    Returns:
        The files, sorted by name, and the names of those that are imported but not there.

    Raises:
        BuildError: a file that cannot be parsed or imports in another way.
    """
    found: dict[str, Path] = {}
    missing: set[str] = set()
    pending = list(CODE_ROOTS)
    while pending:
        name = pending.pop()
        path = folder / f"{name}.py"
        if name in found or name in missing:
            continue
        if not path.is_file():
            missing.add(name)
            continue
        found[name] = path
        try:
            pending += relative_imports(path.read_text(encoding="utf-8"), name)
        except (SyntaxError, UnicodeDecodeError) as error:
            raise BuildError(f"{name}.py cannot be parsed: {error}") from error
    return [found[name] for name in sorted(found)], sorted(f"{name}.py" for name in missing)


def published_files(package: Path = PACKAGE) -> list[Path]:
    """The package's modules that the published classes import, directly or through others."""
    files, missing = code_files(package)
    if missing:
        raise BuildError(f"{package} lacks {missing}.")
    return files


def package_version(package: Path = PACKAGE) -> str:
    """The package's version, read without importing it."""
    match = re.search(r'^__version__ = "(.+)"$', (package / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise BuildError(f"{package} names no version.")
    return match[1]


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's entry in a safetensors file.

    Args:
        dtype: As the file names it, e.g. "BF16".
        file: Name of the file.
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
    if tensors and all(name.startswith("zoom.") for name in tensors):
        return "addon"
    recipe = config.get("quantization_config")
    if not recipe:
        return "full"
    return "4bit" if recipe.get("load_in_4bit") else "8bit"
