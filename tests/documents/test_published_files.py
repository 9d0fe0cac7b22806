"""Rules that keep `modeling_qzoom/*.py` loadable as remote code, read off the source."""

import ast
from pathlib import Path

import pytest

from hub_release.checks.code_rules import broken_rules


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = sorted(path for path in (ROOT / "modeling_qzoom").glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_file_can_be_published(path):
    assert list(broken_rules(path.read_text(encoding="utf-8"), path.name)) == []


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
