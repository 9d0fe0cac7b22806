"""What the evaluation command is given: all that can be known is checked before it runs, bad rows are left out."""

import json
import shutil
from pathlib import Path

import pytest

from modeling_qzoom.evaluation.__main__ import main
from modeling_qzoom.evaluation.arms import ArmRunner
from modeling_qzoom.evaluation.benchmark import measure_file
from tests.generation_fixtures import shared_model
from tests.processing_fixtures import noise, qwen_processor
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("qwen2_5_vl", presets={"fast": {"crop_max_tokens": 8}}).save_pretrained(folder)
    qwen_processor(min_tokens=6, max_tokens=12).save_pretrained(folder)
    return str(folder)


def write_rows(folder: Path, rows: list[dict]) -> Path:
    noise(90, 70).save(folder / "a.png")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"image": "a.png", "answer": "1", **row}) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("batch_size", ["1", "3", "16"])
def test_questions_that_the_model_refuses_are_left_out_and_named(
    checkpoint: str, tmp_path: Path, caplog, batch_size: str
) -> None:
    """What is measured on the others is what a file without them gives."""
    good = [{"id": f"good {n}", "question": f"how many, {n}?"} for n in range(5)]
    bad = [
        {"id": "bad 1", "question": "<|image_pad|>"},
        {"id": "bad 2", "question": "see <|image_pad|><|image_pad|>?"},
    ]
    results = []
    for rows in ([*good[:2], bad[0], *good[2:], bad[1]], good):
        output = tmp_path / "figures.json"
        command = ["--model", checkpoint, "--data", str(write_rows(tmp_path, rows)), "--batch-size", batch_size]
        command += ["--max-new-tokens", "2", "--ladder", "8", "--ladder-rows", "3", "--output", str(output)]
        assert main(command) == 0
        results.append(json.loads(output.read_text()))
    mixed, alone = results
    assert (mixed["other"]["rows_measured"], mixed["other"]["rows_left_out"]) == (5, 2)
    assert "row bad 1 is left out: " in caplog.text and "row bad 2 is left out: " in caplog.text
    assert mixed["summary"] == pytest.approx(alone["summary"])
    assert [point["rows"] for point in mixed["ladder"]] == [3] * len(mixed["ladder"])
    assert [point["visual_tokens"] for point in mixed["ladder"]] == [
        point["visual_tokens"] for point in alone["ladder"]
    ]


def test_only_questions_that_the_model_refuses(checkpoint: str, tmp_path: Path, capsys) -> None:
    data = write_rows(tmp_path, [{"question": "<|image_pad|>"}])
    assert main(["--model", checkpoint, "--data", str(data), "--max-new-tokens", "2"]) == 1
    assert "the model refuses their questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--option", "zoom=always"], 2, "zoom cannot be set"),
        (["--option", "zom=never"], 2, "not NAME=VALUE"),
        (
            ["--option", "region_threshold=0.5", "--option", "region_threshold=0.6"],
            1,
            "region_threshold more than once",
        ),
        (["--output", "FOLDER"], 1, "is a folder; name a file"),
        (["--pareto", "FOLDER"], 1, "is a folder; name a file"),
        (["--output", "FOLDER/rows.jsonl/figures.json"], 1, "no folder"),
        (["--output", "DATA"], 1, "is the data file"),
        (["--output", "FOLDER/same.svg", "--pareto", "FOLDER/same.svg"], 1, "are one file"),
        (["--pareto", "FOLDER/picture.odt"], 1, "names no kind of picture"),
        (["--pareto", "FOLDER/picture"], 1, "names no kind of picture"),
        (["--ladder", "8", "--ladder-rows", "0"], 1, "--ladder needs rows"),
        (["--data", "DATA", "--split", "test"], 1, "--split has no effect on a data file"),
        (["--data", "DATA", "--page-kinds"], 1, "--page-kinds has no effect on a data file"),
        (["--data", "DATA", "--seed", "0"], 1, "--seed has no effect on a data file without --rows"),
        (["--images", "FOLDER"], 1, "--images has no effect on drawn pages"),
        (["--data", "BINARY"], 1, "0 usable rows"),
    ],
)
def test_what_could_not_be_obeyed_is_refused_before_anything_runs(
    checkpoint: str, tmp_path: Path, capsys, monkeypatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.setattr(ArmRunner, "run", lambda *args, **kwargs: pytest.fail("it ran"))
    data, binary = write_rows(tmp_path, [{"question": "what?"}]), tmp_path / "binary.jsonl"
    binary.write_bytes(bytes(range(255, 0, -1)))
    names = {"FOLDER": str(tmp_path), "DATA": str(data), "BINARY": str(binary)}
    given = [next((a.replace(key, path) for key, path in names.items() if a.startswith(key)), a) for a in arguments]
    if "--output" in given and str(data) in given:
        given += ["--data", str(data)]
    before = data.read_bytes()
    try:
        ended = main(["--model", checkpoint, *given])
    except SystemExit as error:  # argparse's own way out
        ended = error.code
    said = capsys.readouterr()
    assert ended == code and message in said.err.strip().splitlines()[-1] and not said.out
    assert data.read_bytes() == before


def test_figures_are_shown_also_where_their_file_cannot_be_written(
    checkpoint: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    data, output = write_rows(tmp_path, [{"question": f"{n}?"} for n in range(2)]), tmp_path / "figures.json"

    def measured(*args):
        output.mkdir()  # in the meantime
        return measure_file(*args)

    monkeypatch.setattr("modeling_qzoom.evaluation.__main__.measure_file", measured)
    assert main(["--model", checkpoint, "--data", str(data), "--max-new-tokens", "2", "--output", str(output)]) == 1
    said = capsys.readouterr()
    assert "exact_zoom" in said.out and "figures.json" in said.err


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damaged_files_of_the_model_are_named(checkpoint: str, tmp_path: Path, capsys, name: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    assert main(["--model", str(folder), "--rows", "2"]) == 1
    assert f"{folder}/{name}" in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_arm_has_no_zoom_option() -> None:
    with pytest.raises(ValueError, match="zoom is no option of an arm"):
        ArmRunner(shared_model("qwen2_5_vl"), qwen_processor(max_tokens=12), {"zoom": "never"})
