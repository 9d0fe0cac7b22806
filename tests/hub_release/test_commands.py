"""How the commands are called: four as files from anywhere, the others as modules from the repository's root."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "demo.ablations",
    "demo.pictures",
    "demo.recipe",
    "measure.cost",
    "measure.memory",
    "measure.serving",
    "measure.speed",
)


@pytest.mark.parametrize("name", ["build", "verify", "push", "convert_official"])
def test_commands_that_are_called_as_files(name, tmp_path):
    """From another folder, with nothing on the path but what is installed."""
    command = [sys.executable, "-I", str(ROOT / "hub_release" / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{name}.py" in done.stdout


def test_modules_that_documents_call_are_there():
    documents = [ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md")]
    named = {name for path in documents for name in re.findall(r"-m hub_release\.([\w.]*\w)", path.read_text())}
    assert named <= set(MODULES)
    for name in MODULES:
        assert find_spec(f"hub_release.{name}") is not None
        place = ROOT / "hub_release" / name.replace(".", "/")
        source = (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")).read_text(encoding="utf-8")
        assert f"`python -m hub_release.{name}`" in source or f"python -m hub_release.{name} " in source
