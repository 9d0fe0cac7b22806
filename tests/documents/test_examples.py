"""Every example is run, on the bundled checkpoint, as a user would run it."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from hub_release.build import build
from modeling_qzoom.report_qzoom import REASONS
from tests.lora_support import needs_lora


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CHECKPOINT = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
QUESTIONS = [item["question"] for item in json.loads((EXAMPLES / "assets" / "page.json").read_text())["questions"]]
needs_parquet = pytest.mark.skipif(
    find_spec("pyarrow") is None, reason="label and answer files are parquet: install the extra 'stages' (or 'train')"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return build(CHECKPOINT, tmp_path_factory.mktemp("demo") / "built")


@pytest.fixture
def common(monkeypatch, tmp_path):
    """examples/common.py, writing below a temporary folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    import common

    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setattr(common, "DEMO", tmp_path / "build" / "qzoom-demo")
    yield common
    sys.modules.pop("common", None)


@pytest.fixture
def run(common, demo, monkeypatch, capfd):
    """Runs an example in this process and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", str(demo), *map(str, arguments)])
        capfd.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_every_example_is_run_here_and_short():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        if path.name not in ("common.py", "demo.py"):  # demo.py has tests of its own
            assert re.search(rf'run\(\s*"{path.stem}"', source), f"no test runs {path.name}"
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 100


def test_the_checkpoint_is_built_where_it_is_missing_or_old(common):
    folder = common.demo_folder()
    assert folder == common.DEMO and (folder / "modeling_qzoom.py").exists()
    marker = folder / "marker"
    marker.touch()
    assert common.demo_folder() == folder and marker.exists()  # up to date
    os.utime(folder / "config.json", (0, 0))
    assert common.demo_folder() == folder and not marker.exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_without_a_model_the_bundled_checkpoint_is_used(common, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ask.py"])
    runpy.run_path(str(EXAMPLES / "ask.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(common.FINE)


def test_ask(run, common, tmp_path):
    first, caption, *_ = run("ask").splitlines()
    assert first.startswith(common.FINE) and re.match(r"(not )?zoomed: ", caption)
    Image.new("RGB", (200, 150), "white").save(tmp_path / "own.png")
    assert run("ask", "--image", tmp_path / "own.png", "--question", "is it empty?").startswith("is it empty? ")


def test_ask_batch(run):
    lines = run("ask_batch").splitlines()
    assert len(lines) == len(QUESTIONS) + 2
    assert all(re.search(rf" ({'|'.join(REASONS)}) +\d+ \+ \d+ visual tokens$", line) for line in lines)
    assert "no_image" in lines[-1] and lines[-1].endswith(" 0 + 0 visual tokens")
    assert not any("no_image" in line for line in lines[:-1])


def test_chat_turns(run):
    lines = run("chat_turns").splitlines()
    assert [line.startswith(question) for line, question in zip(lines, QUESTIONS, strict=True)] == [True] * len(lines)


def test_several_images(run):
    _, looked = run("several_images").splitlines()
    assert re.match(r"looked at image [01] of 2, ", looked)


def test_one_page_many_questions(run):
    *answers, saved, together = run("one_page_many_questions").splitlines()
    assert len(answers) == 10 and all(re.search(rf" ({'|'.join(REASONS)})$", line) for line in answers)
    own, whole = map(int, re.match(r"(\d+) prompt tokens instead of (\d+) ", saved).groups())
    assert own < 0.4 * whole and "Page(" in saved
    assert together == "the same answers from one call: True"


def test_use_pipeline(run):
    *answers, both = run("use_pipeline").splitlines()
    assert [answer.split()[0] for answer in answers] == ["zoom=never", "zoom=auto", "zoom=always"]
    first, second = ast.literal_eval(both)
    assert first == second


@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_four_bit(run, tmp_path, kind):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    first, second = run("four_bit", "--kind", kind, "--output", tmp_path / "small").splitlines()
    footprint = float(re.match(rf"{kind}: ([\d.]+) MiB", first)[1])
    assert footprint < (CHECKPOINT / "model.safetensors").stat().st_size / 2**20
    assert first.split("? ")[1] == second.split(": ")[1]
    assert (tmp_path / "small" / "modeling_qzoom.py").exists()


def test_overlay(run, tmp_path):
    text = run("overlay", "--output", tmp_path)
    sizes = [Image.open(tmp_path / f"overlay-{name}.png").size for name in ("zoomed", "skipped", "empty")]
    assert sizes[0][0] > sizes[1][0]  # the crop stands beside the page
    zoomed, skipped, empty = text.split("--- ")[1:]
    assert "\nzoomed: " in zoomed and "█" in zoomed
    assert "the gate found the coarse view enough" in skipped and "·" not in skipped
    assert "nothing stands out" in empty and "·" in empty and "█" not in empty


def test_dial(run):
    lines = run("dial").splitlines()[2:]
    tokens = {line[:62].strip(): int(line.rsplit("+", 1)[1]) for line in lines}
    assert tokens["zoom=never"] == 0 < tokens["zoom=always, crop_max_tokens=64"] <= 64
    assert tokens["zoom=always, crop_max_tokens=64"] < tokens["zoom=always"]
    reasons = [line.split()[-4] for line in lines]
    assert reasons[-1] == "off" and set(reasons) <= set(REASONS)


def test_benchmark(run, tmp_path):
    small = ("--source-tokens", "64", "--crop-tokens", "16", "--budgets", "64", "256", "--output", tmp_path / "b.json")
    text = run("benchmark", "--flops", "--gate", "light", "--region", "full", "--keep-share", "0.1", *small)
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["gate"], found["region"], found["keep_share"]) == ("light", "full", 0.1)
    assert found["done_over_needed"] == pytest.approx(1, abs=0.02)
    assert found["page_over_plain"] < found["skip_over_plain"] < found["zoom_over_plain"]
    assert f"{found['skip_over_plain']:.4f}" in text and len(found["table"]) == 12
    timed = run("benchmark", "--time", "--runs", "1", "--batch", "2", "--zoom-share", "0.5", *small)
    (row,) = json.loads((tmp_path / "b.json").read_text())["time"]["rows"]
    assert (row["batch"], row["zooming"]) == (2, 1) and timed.count("\n| 64 + 16 |") == 1


def test_attach(run, tmp_path):
    counts, same, loaded = run("attach", "--output", tmp_path / "addon").splitlines()
    assert counts.startswith("Qwen2_5_VLForConditionalGeneration: ")
    assert same == "zoom='never' says what the plain VLM says: True"
    assert loaded.split(": ")[-1] in ("forced", "empty_map")
    assert (tmp_path / "addon" / "config.json").exists()


@needs_lora
@pytest.mark.parametrize("base", [[], ["--four-bit"]])
def test_lora(run, tmp_path, base):
    if base:
        pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    *steps, answer = run("lora", "--steps", "6", "--output", tmp_path / "addon", *base).splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    assert answer.startswith(QUESTIONS[0])
    assert (tmp_path / "addon" / "lora" / "adapter_model.safetensors").exists()


@needs_parquet
def test_train_own_data(run, tmp_path):
    text = run("train_own_data", "--steps", "1", "--output", tmp_path)
    assert [line.split()[4] for line in text.splitlines() if line.startswith("---")] == [
        "find-heads",
        "label-regions",
        "train-regions",
        "calibrate",
    ]
    finished = AutoModelForImageTextToText.from_pretrained(tmp_path / "finished", trust_remote_code=True)
    assert {"fast", "balanced", "accurate"} <= set(finished.config.presets)


def answers(folder: Path) -> list[dict]:
    from pyarrow import parquet

    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    page = Image.open(EXAMPLES / "assets" / "page.png")
    for number in range(count):
        page.crop((40 * number, 30 * number, 40 * number + 300, 30 * number + 250)).save(folder / f"{number:02}.png")
    return folder


@needs_parquet
def test_offline_batch_goes_on_where_it_was_stopped(run, tmp_path):
    """Neither lost nor doubled: after a lost file, with new images, with another question, with an unreadable one."""
    images, output = pictures(tmp_path / "images", 5), tmp_path / "answers"
    command = ("offline_batch", "--images", images, "--output", output, "--rows-per-file", "2", "--batch-size", "2")
    run("offline_batch", *command[1:])
    first = {row["file"]: row for row in answers(output)}
    assert len(answers(output)) == 5 and all(row["reason"] in REASONS for row in first.values())

    next(output.glob("*.parquet")).unlink()  # as if it had been stopped before this one was written
    (output / "0123456789abcdef.partial").write_bytes(b"half of a file")
    pictures(images, 7)
    (images / "broken.png").write_text("no image at all")
    text = run("offline_batch", *command[1:])
    assert re.search(r"8 files, [34] done, [45] to do on 1 processes", text)
    rows = answers(output)
    assert sorted(row["file"] for row in rows) == [*(f"{number:02}.png" for number in range(7)), "broken.png"]
    assert all(row["answer"] == first[row["file"]]["answer"] for row in rows if row["file"] in first)
    broken = next(row for row in rows if row["file"] == "broken.png")
    assert broken["error"] and broken["answer"] is None and sum(row["error"] is not None for row in rows) == 1

    assert "8 files, 7 done, 1 to do" in run("offline_batch", *command[1:])
    assert len(answers(output)) == 8
    run("offline_batch", *command[1:], "--question", "what color is the star?")
    assert len(answers(output)) == 16


@pytest.mark.slow
@needs_parquet
def test_offline_batch_killed_on_two_processes(demo, tmp_path):
    images, output = pictures(tmp_path / "images", 16), tmp_path / "answers"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "offline_batch.py"), "--model", str(demo), "--images", str(images)]
    command += ["--output", str(output), "--rows-per-file", "1", "--batch-size", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(output.glob("*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)  # each in a session of its own
    for victim in (process, *workers):
        victim.kill()
    process.wait()
    psutil.wait_procs(workers)
    made = {row["file"] for row in answers(output)}
    assert 1 <= len(made) < 16, "it has to be stopped in the middle"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"16 files, {len(made)} done, {16 - len(made)} to do on 2 processes" in done.stdout
    assert sorted(row["file"] for row in answers(output)) == [f"{number:02}.png" for number in range(16)]
