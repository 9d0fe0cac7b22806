"""The committed demo checkpoint: data only, small, right on the bundled page."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from modeling_qzoom.evaluation.demo_figures import accuracy, ask, draw_rows
from modeling_qzoom.evaluation.metrics import covered_share, region_recall
from modeling_qzoom.evaluation.synthetic import Question, draw_page
from modeling_qzoom.training.demo_checkpoint import (
    CROP_TOKENS,
    LARGEST_BYTES,
    build_processor,
    figure_table,
    write_checkpoint,
)


ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
ASSETS = ROOT / "examples" / "assets"


@pytest.fixture(scope="module")
def demo() -> tuple[QZoomForConditionalGeneration, QZoomProcessor]:
    model = QZoomForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model, QZoomProcessor.from_pretrained(CHECKPOINT)


def test_the_folder_holds_data_only() -> None:
    suffixes = {path.suffix for path in CHECKPOINT.iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".md"}
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= LARGEST_BYTES
    assert set(json.loads((CHECKPOINT / "config.json").read_text())["presets"]) == set(CROP_TOKENS)


def test_the_bundled_page_is_the_drawn_one_and_answered_right(demo) -> None:
    bundled = json.loads((ASSETS / "page.json").read_text())
    page = draw_page(bundled["seed"])
    stored = np.asarray(Image.open(ASSETS / bundled["image"]))
    # another version of the font renderer may shade a few edge pixels differently
    assert np.mean(np.abs(stored.astype(int) - np.asarray(page.image)) > 8) < 0.001
    rows = [
        (page, Question(item["question"], item["answer"], item["kind"], tuple(item["box"]), None))
        for item in bundled["questions"]
    ]
    answers, reports = ask(*demo, rows)
    assert answers == [question.answer for _, question in rows]
    assert [report.zoomed for report in reports] == [question.kind == "fine" for _, question in rows]
    fine = next(index for index, (_, question) in enumerate(rows) if question.kind == "fine")
    assert covered_share(reports[fine].box, rows[fine][1].box) == 1.0


def test_zooming_reads_what_the_coarse_view_cannot(demo) -> None:
    rows = draw_rows(2_500_000_000, 12)
    fine = [row for row in rows if row[1].kind == "fine"]
    plain, _ = ask(*demo, rows, zoom="never")
    zoomed, reports = ask(*demo, rows)
    assert accuracy(plain, rows, "fine") <= 0.2
    assert accuracy(zoomed, rows, "fine") >= 0.75
    assert accuracy(zoomed, rows, "coarse") >= 0.75
    assert region_recall([report.box for report in reports[::2]], [question.box for _, question in fine]) >= 0.75


def test_what_is_written_loads_and_has_no_code(tokenizer, model, tmp_path) -> None:
    folder = tmp_path / "demo"
    measured = {"summary": {"region_recall": 0.5}, "conditions": {"command": "measure", "pages": 2}}
    write_checkpoint(model, tokenizer, folder, measured)
    assert not list(folder.glob("*.py"))
    assert "| region_recall | 0.500 |" in (folder / "README.md").read_text()
    loaded = QZoomForConditionalGeneration.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    processor = QZoomProcessor.from_pretrained(folder)
    assert (processor.min_tokens, processor.max_tokens) == (32, 64)
    image = Image.new("RGB", (900, 700), "white")
    first = build_processor(tokenizer)(images=[image], text="<|vision_start|><|image_pad|><|vision_end|>red 472")
    second = processor(images=[image], text="<|vision_start|><|image_pad|><|vision_end|>red 472")
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_the_figure_table_names_its_conditions() -> None:
    table = figure_table({"summary": {"a": 0.25}, "conditions": {"command": "run it", "dtype": "float32"}})
    assert "| a | 0.250 |" in table and "`run it`: dtype float32." in table
