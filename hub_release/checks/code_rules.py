"""The rules of published code: what keeps a file from loading where this package is not installed."""

import ast
import re
import sys
from collections.abc import Iterator

from hub_release.repository.files import PACKAGE


# the last four come with transformers and with any image
ALWAYS_THERE = {"torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}
# what transformers' search for imports takes for one, wherever it stands
_IMPORT_TEXT = re.compile(r"^\s*(from\s+\.|import\s)", re.MULTILINE)


def _imported_packages(node: ast.AST) -> set[str]:
    """Names of the packages that a statement imports by their full names."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return {node.module.partition(".")[0]}
    return set()


def broken_rules(source: str, name: str) -> Iterator[str]:
    """Every place where a published file breaks a rule, one sentence each.

    How it imports the files beside it is checked by `repository.code.code_files`, which follows these imports.

    Args:
        source: content of the file.
        name: name of the file.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        place = f"{name}, line {getattr(node, 'lineno', 1)}"
        for package in _imported_packages(node):
            if package == PACKAGE.name:
                yield f"{place}: absolute import of {package}, which is not installed where the file is used"
            elif package == "__future__":
                yield f"{place}: transformers reads annotations, which a __future__ import turns into text"
            elif node in tree.body and package not in ALWAYS_THERE | sys.stdlib_module_names:
                yield f"{place}: {package} is imported at the top, so everybody would have to install it"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _IMPORT_TEXT.search(node.value):
            yield f"{place}: text in a string that transformers takes for an import"
