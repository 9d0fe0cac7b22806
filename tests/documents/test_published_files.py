"""Rules that keep `modeling_qzoom/*.py` loadable as remote code, read off the source."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = sorted(path for path in (ROOT / "modeling_qzoom").glob("*.py") if path.name != "__init__.py")
# the last four come with transformers and with any image
ALWAYS_THERE = {"torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}
STANDARD = set(__import__("sys").stdlib_module_names)


def _top_level_imports(tree: ast.Module) -> list[ast.stmt]:
    return [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_file_can_be_published(path):
    source = path.read_text()
    tree = ast.parse(source)
    for node in _top_level_imports(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, f"{path.name}:{node.lineno}: write 'from .x_qzoom import Y'"
            assert (path.parent / f"{node.module}.py").exists(), f"{path.name}:{node.lineno}: no such file"
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in names:
            package = name.split(".")[0]
            assert package in ALWAYS_THERE | STANDARD, f"{path.name}:{node.lineno}: {package} is optional"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [alias.name for alias in node.names]
            assert "modeling_qzoom" not in [*names, module.split(".")[0]], f"{path.name}: absolute import of ourselves"
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            pytest.fail(f"{path.name}: transformers reads annotations, which a __future__ import turns into text")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.search(r"^\s*(from\s+\.|import\s)", node.value, re.MULTILINE)
            assert not text, f"{path.name}: import text in a string"


@pytest.mark.parametrize("path", sorted(ROOT.glob("hub_release/*.py")), ids=lambda path: path.stem)
def test_release_scripts_are_short(path):
    assert len(path.read_text().splitlines()) <= 400, f"{path} is longer than one idea"


@pytest.mark.parametrize("path", sorted(ROOT.glob("modeling_qzoom/**/*.py")), ids=lambda path: path.stem)
def test_library_files_are_short_and_silent(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400, f"{path} is longer than one idea"
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or path.name == "__main__.py", f"{path}: print in lines {prints}"
