"""Whether a repository holds the package's own code and settings, and nothing that nobody reads."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from hub_release.repository.code import code_files, published_files
from hub_release.repository.files import (
    AUTO_MAPS,
    EVALUATION,
    VERSION_FIELD,
    files_of,
    package_version,
    read_json,
)
from modeling_qzoom.configuration_qzoom import own_fields


Findings = Iterator[str]

# fields that transformers writes into any config.json, or reads from it
_SHARED_FIELDS = {"auto_map", "model_type", "quantization_config", "tie_word_embeddings", "torch_dtype", "use_cache"}
_SHARED_FIELDS |= {"pad_token_id", "bos_token_id", "eos_token_id", VERSION_FIELD}
# files without settings
_NO_SETTINGS = re.compile(rf"tokenizer\.json|vocab\.json|added_tokens\.json|.*\.index\.json|{EVALUATION}/.*")


def _check_code_contents(folder: Path, version: Any) -> Findings:
    """Code is the package's, file by file."""

    def read(path: Path) -> bytes:
        return path.read_bytes().replace(b"\r\n", b"\n")

    given = {path.name: read(path) for path in code_files(folder)[0]}
    own = {path.name: read(path) for path in published_files()}
    differing = sorted(name for name in given.keys() | own.keys() if given.get(name) != own.get(name))
    if not differing:
        return
    here = package_version()
    files = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
    if version is None:
        yield (
            f"{files}: not as in this package (version {here}); changed after the build, or built by another version, "
            "which the folder does not name; build again"
        )
    elif version != here:
        yield (
            f"the folder was built by version {version} of the package, and this is version {here}, whose code "
            f"differs ({files}); verify it with version {version}, or build again"
        )
    else:
        yield f"{files}: not as in this package; changed after the build, or the package was since; build again"


def _references(content: Any) -> Iterator[tuple[str, Any]]:
    """All references to code in a JSON file, however deep: (name, class)."""
    if isinstance(content, list):
        for part in content:
            yield from _references(part)
    elif isinstance(content, dict):
        for name, part in content.items():
            if name in ("auto_map", "custom_pipelines") and part:
                yield from part.items() if isinstance(part, dict) else [(name, part)]
            else:
                yield from _references(part)


def check_contents(folder: Path) -> Findings:
    """The package's code unchanged, no field that nobody reads, no reference to code of others."""
    config = read_json(folder / "config.json")
    yield from _check_code_contents(folder, config.get(VERSION_FIELD))
    known = own_fields() | set(PreTrainedConfig().to_dict()) | _SHARED_FIELDS
    for name in sorted(set(config) - known):
        yield f"config.json: nothing reads the field {name!r}; correct it, or take it out"
    ours = {(name, reference) for references in AUTO_MAPS.values() for name, reference in references.items()}
    for name in files_of(folder):
        if not name.endswith(".json") or _NO_SETTINGS.fullmatch(name):
            continue
        for auto_class, reference in _references(read_json(folder / name)):
            if (auto_class, json.dumps(reference)) not in {(kind, json.dumps(own)) for kind, own in ours}:
                yield f"{name}: {auto_class} refers to {reference!r}, which is no class of ours"
