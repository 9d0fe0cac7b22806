"""The code that a repository of the Hub needs to load its model. Standard library only."""

import ast
from collections.abc import Iterator
from pathlib import Path

from hub_release.repository.errors import BuildError
from hub_release.repository.files import PACKAGE


CODE_ROOTS = ("configuration_qzoom", "modeling_qzoom", "processing_qzoom")


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
    files: dict[str, Path] = {}
    missing: set[str] = set()
    pending = list(CODE_ROOTS)
    while pending:
        name = pending.pop()
        path = folder / f"{name}.py"
        if name in files or name in missing:
            continue
        if not path.is_file():
            missing.add(name)
            continue
        files[name] = path
        try:
            pending += relative_imports(path.read_text(encoding="utf-8"), name)
        except (SyntaxError, UnicodeDecodeError) as error:
            raise BuildError(f"{name}.py cannot be parsed: {error}") from error
    return [files[name] for name in sorted(files)], sorted(f"{name}.py" for name in missing)


def published_files(package: Path = PACKAGE) -> list[Path]:
    """The package's modules that the published classes import, directly or through others."""
    files, missing = code_files(package)
    if missing:
        raise BuildError(f"{package} lacks {missing}.")
    return files
