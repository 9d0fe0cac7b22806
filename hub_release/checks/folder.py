"""What can be wrong with a repository before anything in it is run: each finding is one sentence with its cause."""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers.configuration_utils import PreTrainedConfig

from hub_release.card.card import HISTORY, LIBRARY, TAG, TASK, read_card, read_facts, repository_of, stale_sections
from hub_release.checks.weights import check_weights
from hub_release.repository.code import code_files, published_files
from hub_release.repository.errors import BuildError
from hub_release.repository.files import (
    AUTO_MAPS,
    BASE_LICENCE,
    EVALUATION,
    PACKAGE,
    REQUIRED,
    VERSION_FIELD,
    files_of,
    is_data,
    is_repository,
    package_version,
    read_json,
)
from modeling_qzoom.configuration_qzoom import own_fields


Findings = Iterator[str]
OURS = PACKAGE.name
LARGEST_FILE = 50 * 10**9
"""Bytes of the largest file that the Hub takes."""
# the last four come with transformers and with any image
ALWAYS_THERE = {"torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}
_PICKLE_NAMES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
_HEADER_KEYS = ("library_name", "pipeline_tag", "license", "tags")


# --- files -----------------------------------------------------------------------------------------------------------


def _is_pickle(path: Path) -> bool:
    """Whether a file's name or first bytes are those of pickled objects."""
    if path.suffix in _PICKLE_NAMES:
        return True
    if path.suffix == ".safetensors":  # begins with a length, which may be any bytes
        return False
    with path.open("rb") as stream:
        start = stream.read(2)
    if start == b"PK":
        return zipfile.is_zipfile(path) and any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    return start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")


def check_files(folder: Path) -> Findings:
    """Nothing missing, nothing that does not belong there, no pickle, no link."""
    names = files_of(folder)
    yield from (f"{name} is missing" for name in REQUIRED if name not in names)
    code, missing = code_files(folder)
    yield from (f"code file {name} is missing" for name in missing)
    code_names = {path.name for path in code}
    for name in names:
        path = folder / name
        if path.is_symlink():
            yield f"{name} is a link, and only files can be published"
        elif _is_pickle(path):
            yield f"{name} is a pickle, which runs code when it is read; weights are safetensors only"
        elif name not in code_names and not is_data(name):
            yield f"{name} does not belong in a repository"
        elif path.stat().st_size > LARGEST_FILE:
            yield f"{name} is larger than the Hub takes; build with --max-shard-size 5GB"


def check_code(folder: Path) -> Findings:
    """Code that loads where our package is not installed."""
    for path in code_files(folder)[0]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for package in {module.split(".")[0] for module in modules}:
                place = f"{path.name}, line {node.lineno}"
                if package == OURS:
                    yield f"{place}: absolute import of {OURS}, which is not installed where the file is used"
                elif node in tree.body and package not in ALWAYS_THERE | sys.stdlib_module_names:
                    yield f"{place}: {package} is imported at the top, so everybody would have to install it"


def check_references(folder: Path) -> Findings:
    """`auto_map` in configuration and processor names classes that are there."""
    for name, expected in AUTO_MAPS.items():
        found = read_json(folder / name).get("auto_map") or {}
        for auto_class, reference in expected.items():
            if found.get(auto_class) != reference:
                yield f"{name}: auto_map has {found.get(auto_class)!r} for {auto_class}, and should have {reference!r}"
        for auto_class in sorted(found.keys() - expected.keys()):
            yield f"{name}: auto_map has {found[auto_class]!r} for {auto_class}, which is no class of ours"
        for module, owner in {tuple(reference.split(".")) for reference in expected.values()}:
            tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
            if not any(isinstance(node, ast.ClassDef) and node.name == owner for node in tree.body):
                yield f"{module}.py defines no class {owner}, which {name} refers to"


# --- contents --------------------------------------------------------------------------------------------------------

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


# --- card ------------------------------------------------------------------------------------------------------------


def _read_head(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise BuildError(f"README.md: the head is not YAML: {error}") from error
    if not isinstance(head, dict):
        raise BuildError("README.md begins with no YAML head")
    return head


def _check_head(head: dict[str, Any], folder: Path, base: str | None) -> Findings:
    yield from (f"README.md: the head has no {key}" for key in _HEADER_KEYS if not head.get(key))
    for key, expected in (("library_name", LIBRARY), ("pipeline_tag", TASK)):
        if head.get(key) and head[key] != expected:
            yield f"README.md: {key} is {head[key]!r} instead of {expected!r}"
    if head.get("tags") and TAG not in head["tags"]:
        yield f"README.md: the tags lack {TAG!r}"
    if head.get("license") == "other" and not (head.get("license_name") and head.get("license_link")):
        yield "README.md: the license 'other' needs license_name and license_link"
    if not is_repository(base):
        return
    if head.get("base_model") != base:
        yield f"README.md: base_model is {head.get('base_model')!r}, config.json says {base!r}"
    if not head.get("base_model_relation"):
        yield "README.md: the head has no base_model_relation"
    if not any(name.startswith(f"{BASE_LICENCE}LICEN") for name in files_of(folder)) and not head.get("license_link"):
        yield (
            "the base model's licence is missing; build with --base-folder FOLDER, or put license_link into the head "
            "of the checkpoint's card"
        )


def _check_conditions(folder: Path, conditions: dict[str, Any]) -> Findings:
    """Figures that were measured with other thresholds or budgets are another checkpoint's."""
    if conditions.get("effort") is not None or "--option" in conditions.get("command", ""):
        return
    config, processor = read_json(folder / "config.json"), read_json(folder / "processor_config.json")
    coarse = [processor.get("min_tokens"), processor.get("max_tokens")]
    here = {
        "gate_threshold": config.get("gate_threshold") if config.get("has_gate", True) else None,
        "region_threshold": [config.get("region_threshold"), config.get("region_threshold_mode")],
        "coarse_budget": None if None in coarse else coarse,
    }
    for name, value in here.items():
        if name in conditions and value is not None and conditions[name] != value:
            yield (
                f"{EVALUATION}/figures.json is stale: it was measured with {name} {conditions[name]}, the checkpoint "
                f"has {value}"
            )


def check_card(folder: Path) -> Findings:
    """Metadata complete, and every fact in the card what the files say."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    config = read_json(folder / "config.json")
    try:
        head = _read_head(text)
    except BuildError as error:
        yield str(error)
        return
    yield from _check_head(head, folder, config.get("base_model_name_or_path"))
    name = repository_of(read_card(text))
    if name is None:
        yield f"README.md has no quick start that loads a repository; sections up to '{HISTORY}' are made by build.py"
        return
    facts = read_facts(folder, name)
    yield from (f"README.md: {sentence}; build again" for sentence in stale_sections(text, facts))
    if "figures" in facts.figures:
        yield from _check_conditions(folder, facts.figures["figures"].get("conditions", {}))


CHECKS: dict[str, Callable[[Path], Findings]] = {
    "files": check_files,
    "code": check_code,
    "auto_map": check_references,
    "contents": check_contents,
    "weights": check_weights,
    "card": check_card,
}
"""By name, in order."""
_NEEDED = {
    "code": ("files",),
    "auto_map": ("files",),
    "contents": ("files", "code", "auto_map"),
    "weights": ("files",),
    "card": ("files", "weights"),
}


def check_folder(folder: Path) -> dict[str, list[str]]:
    """Runs the checks in order.

    Returns:
        Findings by name of the check. A check is left out where another one that it relies on has found something.
    """
    found: dict[str, list[str]] = {}
    for name, check in CHECKS.items():
        if any(found.get(needed, True) for needed in _NEEDED.get(name, ())):
            continue
        try:
            found[name] = list(check(folder))
        except BuildError as error:
            found[name] = [str(error)]
    return found
