"""What pip installs: contents of wheel and sdist, both of them in a clean environment, and the API reference."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import modeling_qzoom
from hub_release.checks.clean_environment import make_environment
from tests.loading_fixtures import ZOOM_CONFIG, attach
from tests.processing_fixtures import PROCESSORS
from tests.tiny import tiny_vlm


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "modeling_qzoom"
EXTRAS = {"serve", "stages", "pages", "witness", "train", "quantize", "flash-attn", "docs", "dev"}
# what a user without extras gets besides what these bring along
CORE = {"torch", "transformers", "huggingface-hub", "safetensors", "accelerate", "numpy", "pillow"}
CHILD = """
import json, sys
from PIL import Image
import modeling_qzoom
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor

folder, image = sys.argv[1:]
model = QZoomForConditionalGeneration.from_pretrained(folder).eval()
processor = QZoomProcessor.from_pretrained(folder)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "what is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
)
output = model.generate(**inputs, zoom="always", max_new_tokens=4, do_sample=False, return_zoom_reports=True)
print(json.dumps([modeling_qzoom.__file__, output.sequences.tolist(), output.zoom_reports[0].box]))
"""

pytestmark = pytest.mark.slow


def _run(command: list, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel, built from the sdist as pip does it, and the sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    _run([sys.executable, "-m", "build", "--outdir", folder, ROOT])
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel_names(distributions) -> set[str]:
    with zipfile.ZipFile(distributions[0]) as wheel:
        return set(wheel.namelist())


@pytest.fixture(scope="module")
def metadata(distributions) -> Message:
    with zipfile.ZipFile(distributions[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(wheel.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(wheel_names):
    package = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in wheel_names if ".dist-info/" not in name}
    assert inside == package
    assert "modeling_qzoom/py.typed" in inside
    assert "modeling_qzoom/training/configs/launch/fsdp2.yaml" in inside
    assert "modeling_qzoom/training/configs/qwen2_5_vl_3b/train-regions.yaml" in inside
    assert {Path(name).suffix for name in inside} <= {".py", ".typed", ".yaml", ".json"}


def test_licence_files_travel_along(wheel_names, metadata):
    assert metadata["Name"] == "qzoom" and metadata["Version"] == modeling_qzoom.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    for name in ("LICENSE", "NOTICE"):
        assert any(found.endswith(f".dist-info/licenses/{name}") for found in wheel_names)


def test_every_requirement_is_bounded(metadata):
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {each.name for each in requirements if each.marker is None} == CORE
    for each in requirements:
        operators = {specifier.operator for specifier in each.specifier}
        assert each.name == "qzoom" or {">=", "<"} <= operators, f"{each} lacks a lower or an upper bound"


def test_sdist_can_be_tested(distributions):
    """Tests and what they read are inside; environments and build products are not."""
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "tests/documents/test_packaging.py",
        "hub_release/checkpoints/qzoom-demo/model.safetensors",
        "examples/demo.py",
        "LICENSE",
        "README.md",
        "CITATION.cff",
    }
    assert wanted <= names
    assert not any(name.startswith((".venv", "build/", "out/", "dist/")) for name in names)


def test_installed_package_loads_a_checkpoint(distributions, tmp_path):
    """Wheel and sdist, each in an environment that holds nothing else of ours, run from another folder."""
    wheel, sdist = distributions
    folder, picture = tmp_path / "checkpoint", ROOT / "examples" / "assets" / "page.png"
    model = attach(tiny_vlm("qwen2_5_vl"), "qwen2_5_vl")
    model.save_pretrained(folder)
    PROCESSORS["qwen2_5_vl"](**ZOOM_CONFIG["qwen2_5_vl"]).save_pretrained(folder)
    python = make_environment(tmp_path / "environment", ("torch", "transformers"))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, wheel])

    away = {"cwd": tmp_path, "env": {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}}
    file, *answer = json.loads(_run([python, "-I", "-c", CHILD, folder, picture], **away))
    assert Path(file).is_relative_to(tmp_path / "environment")
    _, *expected = json.loads(_run([sys.executable, "-c", CHILD, folder, picture], cwd=ROOT))
    assert answer == expected

    for command, word in (("training", "train-regions"), ("evaluation", "--model")):
        assert word in _run([python, "-I", "-m", f"modeling_qzoom.{command}", "--help"], **away)

    _run([*pip, "--force-reinstall", "--no-deps", sdist])
    _run([python, "-I", "-c", "from modeling_qzoom import overlay"], **away)


def test_api_reference(tmp_path):
    """`make docs`, into another folder."""
    recipe = _run(["make", "-n", "docs"], cwd=ROOT)
    command = next(line for line in recipe.splitlines() if "-m pdoc" in line)
    arguments = shlex.split(command[command.index("-m pdoc") : command.index("; status")])
    _run([sys.executable, *(str(tmp_path) if word == "build/docs" else word for word in arguments)], cwd=ROOT)
    assert (tmp_path / "index.html").is_file()
    assert 'id="QZoomForConditionalGeneration.generate"' in (tmp_path / "modeling_qzoom.html").read_text()
    package = tmp_path / "modeling_qzoom"
    assert 'id="QZoomLoadingMixin.from_backbone"' in (package / "loading_qzoom.html").read_text()
    assert (package / "training" / "regions" / "config.html").is_file()
    assert not list(package.glob("training/demo_*"))


def test_the_extra_train_resolves_to_a_pair_that_trains_lora(tmp_path):
    """As a user meets it: torch, then the package with its extra, in an environment that holds nothing else."""
    python = make_environment(tmp_path / "environment", ("torch",))
    _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{ROOT}[train]"])
    clone = tmp_path / "clone"  # the example writes beside itself
    for name in ("examples", "hub_release", "modeling_qzoom"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, clone)
    settings = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "examples/lora.py", "--steps", "2", "--output", tmp_path / "addon"]
    printed = _run(command, cwd=clone, env=settings).splitlines()
    assert [line.split()[:2] for line in printed[:2]] == [["step", "1"], ["step", "2"]]
    assert (tmp_path / "addon" / "lora" / "adapter_model.safetensors").is_file()
