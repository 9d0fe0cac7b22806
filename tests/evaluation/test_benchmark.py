"""The benchmark on a tiny random model: arms that are derived equal arms that are run, and figures add up."""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from modeling_qzoom.asking.answers import Answer, ask
from modeling_qzoom.asking.budgets import coarse_budget, plain_budget
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.gating import derive_auto
from modeling_qzoom.asking.session import Session
from modeling_qzoom.data.drawn.questions import draw_rows
from modeling_qzoom.evaluation.__main__ import main
from modeling_qzoom.evaluation.arms import ArmRunner, Item
from modeling_qzoom.evaluation.benchmark import SUMMARY_NAMES, drawn_items, measure_drawn, measure_file
from modeling_qzoom.evaluation.figures import Outcome, Record, ladder_point, summarize
from modeling_qzoom.evaluation.pareto import draw_pareto
from tests.generation_fixtures import shared_model
from tests.processing_fixtures import llava_processor, noise, qwen_processor
from tests.tiny import tiny_model


PEAK = {"region_threshold": 0.9, "region_threshold_mode": "peak"}
PRESETS = {"fast": {"crop_max_tokens": 8, "gate_threshold": 0.9}, "same": {}}


def tiny_processor():
    return qwen_processor(min_tokens=6, max_tokens=12)


def rows_of(split: str = "test", count: int = 6) -> list[tuple[Image.Image, str]]:
    return [(item.image, item.question) for item in drawn_items(draw_rows(split, 3, count))]


def session(max_new_tokens: int) -> Session:
    return Session(shared_model("qwen2_5_vl"), tiny_processor(), ModelConfig(max_new_tokens=max_new_tokens))


def asked(rows: list, **options) -> list[Answer]:
    return list(ask(session(4), rows, **options))


def assert_same(derived: Answer, direct: Answer) -> None:
    one, two = derived.report, direct.report
    assert derived.text == direct.text
    assert (one.reason, one.zoomed, one.box) == (two.reason, two.zoomed, two.box)
    assert (one.coarse_tokens, one.crop_tokens) == (two.coarse_tokens, two.crop_tokens)
    assert one.gate_probability == pytest.approx(two.gate_probability, abs=1e-5)
    assert (derived.prompt_tokens, derived.suffix_tokens, derived.grid) == (
        direct.prompt_tokens,
        direct.suffix_tokens,
        direct.grid,
    )


def test_auto_is_derived_as_it_would_be_run() -> None:
    """The invariants of the design that the benchmark rests on, seen from its own side."""
    rows = rows_of()
    never, always = asked(rows, zoom="never"), asked(rows, zoom="always", **PEAK)
    held_open = asked(rows, zoom="auto", gate_threshold=0.0, **PEAK)
    for forced, opened in zip(always, held_open, strict=True):
        assert (forced.text, forced.report.box) == (opened.text, opened.report.box)
        assert (forced.report.reason, opened.report.reason) == ("forced", "gate_open")
    ranked = sorted(answer.report.gate_probability for answer in held_open)
    threshold = (ranked[2] + ranked[3]) / 2
    direct = asked(rows, zoom="auto", gate_threshold=threshold, **PEAK)
    assert sum(answer.report.zoomed for answer in direct) == 3
    for parts in zip(never, held_open, direct, strict=True):
        assert_same(derive_auto(*parts[:2], threshold), parts[2])
    batches = asked(rows, zoom="auto", gate_threshold=threshold, batch_size=2, **PEAK)
    for one, two in zip(batches, direct, strict=True):
        assert_same(one, two)


def test_a_runner_derives_what_it_would_run() -> None:
    model, processor = tiny_model("qwen2_5_vl", **PEAK, presets=PRESETS), tiny_processor()
    runner = ArmRunner(model, processor, {"gate_threshold": 0.5}, batch_size=4, ladder=(8, 12), ladder_rows=5)
    assert [arm.name for arm in runner.presets] == ["auto_fast", "auto_same"]
    items = list(drawn_items(draw_rows("test", 3, 6)))
    derived, direct = list(runner.run(items)), list(runner.run(items, derive=False))
    opened = 0
    for number, (one, two) in enumerate(zip(derived, direct, strict=True)):
        names = {"plain", "always", "auto"} | ({"plain_8x"} if one.kind == "fine" else set())
        if number < 5:
            names |= {"plain_8", "plain_12", "auto_fast", "auto_same"}
        assert set(one.outcomes) == names
        assert set(two.outcomes) == names - {"always", "plain_8x"}
        for name, outcome in two.outcomes.items():
            assert one.outcomes[name].box == outcome.box and one.outcomes[name].flops == outcome.flops
            assert one.outcomes[name].visual_tokens == outcome.visual_tokens
        assert not one.outcomes["plain"].zoomed and one.outcomes["always"].zoomed
        if number < 5:
            # the ladder's step at the coarse budget is the plain arm itself
            assert one.outcomes["plain_12"] == one.outcomes["plain"]
            crop = one.outcomes["auto_fast"].visual_tokens - one.outcomes["plain"].visual_tokens
            assert crop <= 8
        opened += one.outcomes["auto"].zoomed
    assert 0 < opened < 6


def test_images_are_drawn_a_batch_at_a_time() -> None:
    drawn = []

    def rows() -> Iterator[tuple[Image.Image, str]]:
        for number in range(100):
            drawn.append(number)
            yield noise(80, 60, number), "what?"

    answers = ask(
        session(1),
        rows(),
        batch_size=3,
        budget=(4, 6),
        zoom="never",
    )
    assert 4 <= next(answers).report.coarse_tokens <= 6
    assert len(drawn) == 3


def test_budgets_come_from_the_processor() -> None:
    assert coarse_budget(tiny_processor()) == (6, 12)
    size = qwen_processor().image_processor.size
    assert coarse_budget(qwen_processor()) == (size["shortest_edge"] // 784, size["longest_edge"] // 784)
    assert coarse_budget(llava_processor()) is None
    assert plain_budget(8) == (4, 8) and plain_budget(1) == (1, 1)


def test_a_measurement_has_every_name_and_is_json() -> None:
    model = tiny_model("qwen2_5_vl", **PEAK)
    runner = ArmRunner(model, tiny_processor(), max_new_tokens=3, ladder=(8,), ladder_rows=4)
    result = measure_drawn(runner, "test", 1, 12, by_page_kind=True)
    assert tuple(result["summary"]) == SUMMARY_NAMES
    assert set(result) == {"summary", "intervals", "by_page_kind", "other", "ladder"}
    for name, value in result["summary"].items():
        low, high = result["intervals"][name]
        assert -1 <= value <= 1 and low - 1e-9 <= value <= high + 1e-9, name
    assert result["other"]["extra_rows"] == {"multi": 1, "absent": 1}
    assert {"multi_accuracy_zoom", "absent_accuracy_plain", "fine_zoom_minus_plain_8x"} <= set(result["other"])
    assert set(result["other"]["scores"]) == {"fine", "coarse", "multi", "absent"}
    assert result["other"]["visual_tokens_fine_plain"] <= 12 < result["other"]["visual_tokens_fine_plain_8x"] <= 96
    assert [part["rows"] for part in result["by_page_kind"].values()] == [4, 4, 4]
    assert [(point["model"], point["label"], point["rows"]) for point in result["ladder"]] == [
        ("plain", "8", 4),
        ("zoom", "auto", 4),
    ]
    assert json.loads(json.dumps(result)) == result
    with pytest.raises(ValueError, match="at least two rows"):
        measure_drawn(runner, "test", 1, 1)


def test_without_a_gate_every_row_zooms_and_the_auroc_is_missing() -> None:
    runner = ArmRunner(tiny_model("qwen2_5_vl", has_gate=False, **PEAK), tiny_processor(), max_new_tokens=2)
    result = measure_drawn(runner, "validation", 1, 4)
    assert set(SUMMARY_NAMES) - set(result["summary"]) == {"gate_auroc"}
    assert result["summary"]["zoomed_share_coarse"] == 1.0 and result["summary"]["gating_loss"] == 0.0
    assert result["ladder"] == []


def test_one_fixed_token_grid_has_no_large_budget() -> None:
    model = tiny_model("llava", **PEAK)
    result = measure_drawn(ArmRunner(model, llava_processor(), max_new_tokens=2, ladder_rows=2), "test", 1, 4)
    assert set(SUMMARY_NAMES) - set(result["summary"]) == {"fine_accuracy_plain_8x"}
    assert [point["model"] for point in result["ladder"]] == ["zoom"]
    with pytest.raises(ValueError, match="several resolutions"):
        ArmRunner(model, llava_processor(), ladder=(8,))


def outcome(right: bool, *, zoomed: bool = False, gate: float | None = None, box: tuple | None = None) -> Outcome:
    return Outcome(float(right), float(right), float(right), zoomed, gate, box, 10 + 10 * zoomed, 10**9)


def test_the_summary_of_four_rows_worked_out_by_hand() -> None:
    covering, missing = (0, 0, 50, 20), (60, 60, 100, 100)
    records = [
        Record("fine", "scene", (10, 0, 20, 10), (100, 100), {
            "plain": outcome(False), "plain_8x": outcome(True),
            "always": outcome(True, zoomed=True, gate=0.9, box=covering),
            "auto": outcome(True, zoomed=True, gate=0.9, box=covering),
        }),
        Record("fine", "form", (10, 0, 20, 10), (100, 100), {
            "plain": outcome(False), "plain_8x": outcome(False),
            "always": outcome(True, zoomed=True, gate=0.4, box=missing), "auto": outcome(False, gate=0.4),
        }),
        Record("coarse", "scene", (0, 0, 9, 9), (100, 100), {
            "plain": outcome(True), "always": outcome(False, zoomed=True, gate=0.6, box=missing),
            "auto": outcome(False, zoomed=True, gate=0.6, box=missing),
        }),
        Record("coarse", "form", (0, 0, 9, 9), (100, 100), {
            "plain": outcome(True), "always": outcome(False, gate=0.1), "auto": outcome(True, gate=0.1),
        }),
    ]  # fmt: skip
    figures = summarize(records)
    assert figures.values == pytest.approx(
        {
            "fine_accuracy_zoom": 1.0,
            "fine_accuracy_plain_coarse": 0.0,
            "fine_accuracy_plain_8x": 0.5,
            "coarse_accuracy_zoom": 0.5,
            "coarse_accuracy_plain": 1.0,
            "region_recall": 0.5,
            "region_area": (0.1 + 0.16) / 2,
            "gate_auroc": 0.75,
            "gating_loss": 2 / 4 - 2 / 4,
            "zoomed_share_coarse": 0.5,
        }
    )
    assert set(figures.intervals) == set(figures.values)
    point = ladder_point(records, "auto", "zoom", "auto")
    assert (point["accuracy"], point["visual_tokens"], point["fine_accuracy"]) == (0.5, 15.0, 0.5)
    assert ladder_point(records, "plain_7", "plain", "7") is None


class FileRow:
    def __init__(self, name: str, answers: tuple[str, ...], image: Image.Image | None = None):
        self.id, self.question, self.answers, self.image = name, "what?", answers, image

    def load_image(self) -> Image.Image:
        if self.image is None:
            raise ValueError("cannot be read")
        return self.image


def test_rows_of_a_file_that_cannot_be_scored_are_counted_and_named(caplog) -> None:
    runner = ArmRunner(shared_model("qwen2_5_vl"), tiny_processor(), max_new_tokens=2)
    rows = [
        FileRow("a", ("1",), noise(90, 70)),
        FileRow("b", ("2",)),
        FileRow("c", ()),
        FileRow("d", ("x", "y"), noise(60, 60)),
    ]
    result = measure_file(runner, rows)
    assert (result["other"]["rows_measured"], result["other"]["rows_left_out"]) == (2, 2)
    assert "row b is left out: cannot be read" in caplog.text and "row c is left out" in caplog.text
    assert {"exact_zoom", "anls_plain", "relaxed_zoom", "zoomed_share"} <= set(result["summary"])
    assert result["other"]["prefill_gflops_plain"] > 0
    with pytest.raises(ValueError, match="None of the 1 rows can be scored"):
        measure_file(runner, [FileRow("c", ())])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("qwen2_5_vl", presets=PRESETS, **PEAK)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def test_the_command_writes_figures_conditions_and_picture(checkpoint: str, tmp_path: Path, capsys) -> None:
    output, picture = tmp_path / "figures.json", tmp_path / "pareto.png"
    arguments = [
        "--model",
        checkpoint,
        "--rows",
        "4",
        "--seed",
        "9",
        "--output",
        str(output),
        "--pareto",
        str(picture),
    ]
    assert (
        main([*arguments, "--ladder", "8, 16", "--ladder-rows", "2", "--max-new-tokens", "2", "--effort", "fast"]) == 0
    )
    result = json.loads(output.read_text())
    assert set(result) == {"summary", "intervals", "by_page_kind", "other", "ladder", "conditions"}
    conditions = result["conditions"]
    expected = {"rows": 4, "split": "test", "seed": 9, "coarse_budget": [6, 12], "crop_budget": [4, 8]}
    expected |= {"gate_threshold": 0.9, "region_threshold": [0.9, "peak"], "effort": "fast", "dtype": "float32"}
    expected |= {"crop_rule": "fixed", "region_rules": ["fixed", 0.0, 0.0]}
    assert {name: conditions[name] for name in expected} == expected
    assert {"command", "attention", "torch", "transformers", "machine", "threads", "seconds"} <= set(conditions)
    assert [point["label"] for point in result["ladder"]] == ["8", "16", "fast", "same"]
    assert Image.open(picture).size[0] > 300
    assert "fine_accuracy_zoom" in capsys.readouterr().out


def test_the_command_measures_a_file(checkpoint: str, tmp_path: Path) -> None:
    noise(90, 70).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"image": "a.png", "question": f"what {n}?", "answer": ["1", "2"]} for n in range(3)]
    rows.append({"image": "bad.png", "question": "what?", "answer": "1"})
    data, output = tmp_path / "rows.jsonl", tmp_path / "figures.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", checkpoint, "--data", str(data), "--max-new-tokens", "2", "--ladder", "8"]
    assert main([*arguments, "--ladder-rows", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["other"]["rows_measured"] == result["conditions"]["rows"] == 3
    assert result["other"]["rows_left_out"] == 1
    assert all(math.isfinite(value) for value in result["summary"].values())
    assert result["conditions"]["split"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "/nowhere"], 1, "is no folder of a checkpoint"),
        (["--data", "/nowhere.jsonl"], 1, "there is no such file"),
        (["--data", "EMPTY"], 1, "rows.jsonl"),
        (["--output", "/nowhere/figures.json"], 1, "no folder /nowhere to write to"),
        (["--effort", "heroic"], 1, "not a preset"),
        (["--ladder-rows", "0", "--pareto", "picture.png"], 1, "--pareto needs a ladder"),
        (["--rows", "0"], 2, "at least 2"),
        (["--split", "dev"], 2, "invalid choice"),
        (["--ladder", "32,many"], 2, "'many' is not a whole number"),
        (["--seed", "x"], 2, "not a whole number"),
    ],
)
def test_bad_input_ends_with_one_line(
    checkpoint: str, tmp_path: Path, capsys, arguments: list[str], code: int, message: str
) -> None:
    empty = tmp_path / "rows.jsonl"
    empty.write_text("")
    given = [str(empty) if argument == "EMPTY" else argument for argument in arguments]
    try:
        ended = main(["--model", checkpoint, "--rows", "2", *given])
    except SystemExit as error:  # argparse's own way out
        ended = error.code
    assert ended == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and "Traceback" not in "".join(lines)
    assert code == 2 or len([line for line in lines if line.startswith("error:")]) == 1


def test_damaged_weights_end_with_one_line(checkpoint: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert main(["--model", str(folder), "--rows", "2"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error:")


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'qzoom\[stages\]'"):
        draw_pareto([], tmp_path / "pareto.png")


def test_a_picture_needs_points(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no point to draw"):
        draw_pareto([], tmp_path / "pareto.png")


def test_a_benchmark_item_needs_no_kinds() -> None:
    runner = ArmRunner(shared_model("qwen2_5_vl"), tiny_processor(), max_new_tokens=1)
    (record,) = runner.run([Item(noise(60, 60), "what?", ["a", "b"])], derive=False)
    assert (record.kind, record.target, record.size) == ("", None, (60, 60))
