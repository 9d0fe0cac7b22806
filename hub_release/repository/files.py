"""What files a published folder consists of, and what they are called. Standard library only."""

import json
import re
from pathlib import Path
from typing import Any

from hub_release.repository.errors import BuildError


ROOT = Path(__file__).resolve().parents[2]
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
LICENCE_FILES = ("LICENSE", "NOTICE")
# what a hosted endpoint needs beside the model
ENDPOINT = ROOT / "hub_release" / "endpoint"
ENDPOINT_FILES = ("handler.py", "requirements.txt")
# what the names of the base model's licence files begin with
BASE_LICENCE = "BASE_"
# folder of what was measured with a checkpoint, one JSON file of each kind
EVALUATION = "evaluation"
FIGURE_KINDS = ("figures", "shifted", "seeds", "times", "ablations")
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

VERSION_FIELD = "qzoom_version"
"""Field of config.json for the version of the package that a repository's code is from."""


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
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def package_version(package: Path = PACKAGE) -> str:
    """The package's version, read without importing it."""
    match = re.search(r'^__version__ = "(.+)"$', (package / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise BuildError(f"{package} names no version.")
    return match[1]
