"""The bundled checkpoint: what `make demo` shows, and what is committed."""

import importlib.util
import json
import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from hub_release.checks.clean_environment import disagreements, make_environment, probe
from hub_release.repository.files import EVALUATION, FIGURE_KINDS


ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
ASSETS = ROOT / "examples" / "assets"
DATA_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def demo():
    """examples/demo.py as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(demo, monkeypatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    text = StringIO()
    with redirect_stdout(text):
        code = demo.main()
    return code, text.getvalue()


def test_bundled_questions(demo, monkeypatch, tmp_path):
    code, text = run(demo, monkeypatch, "--output", str(tmp_path))
    assert code == 0, text
    assert text.count("gate_closed") == 1 and text.count("gate_open") == 1
    assert len(list(tmp_path.glob("overlay-*.png"))) == 2


def test_a_wrong_answer_fails(demo, monkeypatch, tmp_path):
    bundled = json.loads((ASSETS / "page.json").read_text())
    bundled["questions"][0]["answer"] = "nothing of the kind"
    (tmp_path / "page.json").write_text(json.dumps(bundled))
    (tmp_path / bundled["image"]).write_bytes((ASSETS / bundled["image"]).read_bytes())
    monkeypatch.setattr(demo, "ASSETS", tmp_path)
    assert run(demo, monkeypatch, "--output", str(tmp_path / "out"))[0] == 1


def test_own_image_and_bad_input(demo, monkeypatch, tmp_path, capsys):
    page = str(ASSETS / "page.png")
    code, text = run(demo, monkeypatch, "--image", page, "--question", "what is this?", "--output", str(tmp_path))
    assert code == 0 and "pages of its own kind" in text
    assert run(demo, monkeypatch, "--image", page)[0] == 1
    assert "needs a question" in capsys.readouterr().err
    assert run(demo, monkeypatch, "--image", "nowhere.png", "--question", "?")[0] == 1
    assert "no image nowhere.png" in capsys.readouterr().err
    (tmp_path / "broken.png").write_text("no image at all")
    assert run(demo, monkeypatch, "--image", str(tmp_path / "broken.png"), "--question", "?")[0] == 1
    assert "broken.png" in capsys.readouterr().err
    Image.new("RGB", (9, 12), "white").save(tmp_path / "tiny.png")
    tiny = ("--image", str(tmp_path / "tiny.png"), "--question", "what color is the star?", "--output", str(tmp_path))
    code, text = run(demo, monkeypatch, *tiny)
    assert code == 0 and "of full resolution" not in text
    Image.new("RGB", (6000, 20)).save(tmp_path / "thin.png")
    assert run(demo, monkeypatch, "--image", str(tmp_path / "thin.png"), "--question", "?")[0] == 1
    assert "200" in capsys.readouterr().err
    assert run(demo, monkeypatch, *tiny[:-1], str(tmp_path / "thin.png"))[0] == 1  # overlays below a file
    assert capsys.readouterr().err.startswith("error: ")


def test_committed_checkpoint_is_data_only():
    """Small, bf16, and wide enough for 4-bit kernels on the CPU."""
    paths = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    files = {path.relative_to(CHECKPOINT).as_posix(): path.stat().st_size for path in paths}
    assert set(files) == DATA_FILES | {f"{EVALUATION}/{kind}.json" for kind in FIGURE_KINDS}
    assert sum(files.values()) <= 8_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    text, vision = config["vlm_config"]["text_config"], config["vlm_config"]["vision_config"]
    widths = [part[name] for part in (text, vision) for name in ("hidden_size", "intermediate_size")]
    assert all(width % 64 == 0 for width in widths)
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}


@pytest.mark.slow
def test_demo_in_a_clean_environment(demo, tmp_path):
    """torch, transformers and pillow alone: every Auto class, the pipeline and a saved copy give the true answer."""
    python = os.environ.get("QZOOM_CLEAN_PYTHON") or make_environment(tmp_path / "environment")
    folder = demo.build(CHECKPOINT, tmp_path / "demo")
    for item in json.loads((ASSETS / "page.json").read_text())["questions"]:
        result = probe(folder, ASSETS / "page.png", item["question"], python=python, options={"max_new_tokens": 12})
        assert result["present"] == []
        assert disagreements(result["answers"]) == []
        assert {answer["text"].strip() for answer in result["answers"].values()} == {item["answer"]}
