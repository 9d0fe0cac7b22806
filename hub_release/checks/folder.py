"""What can be wrong with a repository before anything in it is run: each finding is one sentence with its cause."""

import ast
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hub_release.checks.card import check_card
from hub_release.checks.code_rules import broken_rules
from hub_release.checks.contents import check_contents
from hub_release.checks.weights import check_weights
from hub_release.repository.code import code_files
from hub_release.repository.errors import BuildError
from hub_release.repository.files import (
    AUTO_MAPS,
    ENDPOINT,
    ENDPOINT_FILES,
    REQUIRED,
    files_of,
    is_data,
    read_json,
)


Findings = Iterator[str]
# bytes of the largest file that the Hub takes
LARGEST_FILE = 50 * 10**9
_PICKLE_NAMES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")


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
        elif name in ENDPOINT_FILES:
            if path.read_bytes() != (ENDPOINT / name).read_bytes():
                yield f"{name} is not as in this package; build again with --handler"
        elif name not in code_names and not is_data(name):
            yield f"{name} does not belong in a repository"
        elif path.stat().st_size > LARGEST_FILE:
            yield f"{name} is larger than the Hub takes; build with --max-shard-size 5GB"


def check_code(folder: Path) -> Findings:
    """Code that loads where our package is not installed."""
    for path in code_files(folder)[0]:
        yield from broken_rules(path.read_text(encoding="utf-8"), path.name)


def check_references(folder: Path) -> Findings:
    """`auto_map` in configuration and processor names classes that are there."""
    for name, expected in AUTO_MAPS.items():
        given = read_json(folder / name).get("auto_map") or {}
        for auto_class, reference in expected.items():
            if given.get(auto_class) != reference:
                yield f"{name}: auto_map has {given.get(auto_class)!r} for {auto_class}, and should have {reference!r}"
        for auto_class in sorted(given.keys() - expected.keys()):
            yield f"{name}: auto_map has {given[auto_class]!r} for {auto_class}, which is no class of ours"
        for module, owner in {tuple(reference.split(".")) for reference in expected.values()}:
            tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
            if not any(isinstance(node, ast.ClassDef) and node.name == owner for node in tree.body):
                yield f"{module}.py defines no class {owner}, which {name} refers to"


# by name, in order
CHECKS: dict[str, Callable[[Path], Findings]] = {
    "files": check_files,
    "code": check_code,
    "auto_map": check_references,
    "contents": check_contents,
    "weights": check_weights,
    "card": check_card,
}
# checks that have to find nothing before one is made
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
    findings: dict[str, list[str]] = {}
    for name, check in CHECKS.items():
        if any(findings.get(needed, True) for needed in _NEEDED.get(name, ())):
            continue
        try:
            findings[name] = list(check(folder))
        except BuildError as error:
            findings[name] = [str(error)]
    return findings
