"""Examples that are given what they cannot use: one line, and an exit status that says so."""

# ruff: noqa: F811  (fixtures of test_examples)

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import Table, parquet

from tests.documents.test_examples import EXAMPLES, ROOT, answers, common, demo, pictures, run  # noqa: F401


def stops(capfd, run, name: str, *given: str) -> str:
    """The error that an example ends with before it loads a model."""
    with pytest.raises(SystemExit) as stopped:
        run(name, *given)
    assert stopped.value.code not in (0, None)
    return str(stopped.value.code) if isinstance(stopped.value.code, str) else capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ask", ["--image", "/no/such.png"], "there is no file '/no/such.png'"),
        ("ask_batch", ["--image", "/no/such.png"], "there is no file"),
        ("chat_turns", ["--image", "/tmp"], "there is no file '/tmp'"),
        ("dial", ["--image", ""], "there is no file"),
        ("overlay", ["--image", "/no/such.png"], "there is no file"),
        ("one_page_many_questions", ["--image", "/no/such.png"], "there is no file"),
        ("several_images", ["--images", "/no/such.png"], "there is no file"),
        ("train_own_data", ["--data", "/no/such.jsonl"], "there is no file"),
        ("train_own_data", ["--steps", "-1"], "'-1' is not a whole number of at least 1"),
        ("lora", ["--steps", "0"], "'0' is not a whole number of at least 1"),
        ("attach", ["--layer", "2.5"], "'2.5' is not a whole number of at least 1"),
        ("offline_batch", ["--images", "/no/such"], "there is no folder '/no/such'"),
        ("offline_batch", ["--batch-size", "-4"], "'-4' is not a whole number of at least 1"),
        ("offline_batch", ["--rows-per-file", "0"], "'0' is not a whole number of at least 1"),
        ("offline_batch", ["--question", "what\udce9?"], "--question is no text in UTF-8"),
    ],
)
def test_odd_arguments(name, given, message, run, capfd) -> None:
    assert message in stops(capfd, run, name, *given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ask", ["--model", "no/such/model"], "no/such/model"),
        ("overlay", ["--image", "TEXT"], "cannot identify image file"),
        ("offline_batch", ["--output", "TEXT"], "File exists"),
    ],
)
def test_what_is_found_later_is_one_line_as_well(name, given, message, demo, tmp_path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--model", str(demo)]
    command += [str(text) if argument == "TEXT" else argument for argument in given]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr.splitlines()[-1]


@pytest.fixture
def batch(run, tmp_path):
    """Runs the example on three pictures, two rows a file."""
    images = pictures(tmp_path / "images", 3)

    def ask(*more: str) -> str:
        return run(
            "offline_batch", "--images", images, "--output", tmp_path / "answers", "--rows-per-file", "2", *more
        )

    return ask


def test_a_folder_without_files(run, tmp_path, capfd) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    assert "there is no file in" in stops(
        capfd, run, "offline_batch", "--images", tmp_path / "empty", "--output", tmp_path / "answers"
    )


@pytest.mark.parametrize("kind", ["cut short", "other columns"])
def test_foreign_files_among_the_answers_are_named_and_kept(kind, batch, tmp_path) -> None:
    foreign = tmp_path / "answers" / "foreign.parquet"
    foreign.parent.mkdir()
    parquet.write_table(Table.from_pydict({"file": ["00.png"], "text": ["mine"]}), foreign)
    if kind == "cut short":
        foreign.write_bytes(foreign.read_bytes()[:-9])
    before = foreign.read_bytes()
    with pytest.raises(ValueError, match=r"foreign\.parquet .* move it away"):
        batch()
    assert foreign.read_bytes() == before


def test_images_that_were_repaired_are_asked_again(batch, tmp_path) -> None:
    """Also where they share a file with answers, and where they come first in it; no answer is lost or doubled."""
    images = tmp_path / "images"
    for name in ("00.png", "02.png"):
        (images / name).write_bytes(b"no image")
    assert "0 done, 3 to do" in batch()
    assert "1 done, 2 to do" in batch()
    rows = {row["file"]: row for row in answers(tmp_path / "answers")}
    assert len(answers(tmp_path / "answers")) == 3
    assert {name for name, row in rows.items() if row["error"]} == {"00.png", "02.png"}
    kept = rows["01.png"]["answer"]
    Image.new("RGB", (80, 60), "white").save(images / "00.png")
    batch("--question", "what color is the star?")  # leaves rows about other questions alone
    assert "1 done, 2 to do" in batch()
    rows = answers(tmp_path / "answers")
    asked = [row for row in rows if row["question"] != "what color is the star?"]
    assert sorted((row["file"], row["error"] is None) for row in asked) == [
        ("00.png", True),
        ("01.png", True),
        ("02.png", False),
    ]
    assert next(row["answer"] for row in asked if row["file"] == "01.png") == kept
    assert len(rows) == 6 and not list((tmp_path / "answers").glob("*.partial"))


def test_names_that_are_no_text_and_answers_below_the_images(run, tmp_path) -> None:
    images = pictures(tmp_path / "images", 1)
    bad = os.fsencode(images) + b"/caf\xe9"
    for name in (bad + b".png", bad + b".jpg"):
        try:
            Path(os.fsdecode(name)).write_bytes((images / "00.png").read_bytes())
        except OSError:
            pytest.skip("this file system refuses file names that are no UTF-8, so no user can have such a file here")
    Path(os.fsdecode(bad + b".jpg")).write_bytes(b"no image")
    output = images / "answers"
    assert "3 files, 0 done, 3 to do" in run("offline_batch", "--images", images, "--output", output)
    rows = {row["file"]: row for row in answers(output)}
    assert set(rows) == {"00.png", "caf\\udce9.png", "caf\\udce9.jpg"}
    assert rows["caf\\udce9.png"]["answer"] == rows["00.png"]["answer"] and rows["caf\\udce9.jpg"]["error"]
    assert "3 files, 2 done, 1 to do" in run("offline_batch", "--images", images, "--output", output)
