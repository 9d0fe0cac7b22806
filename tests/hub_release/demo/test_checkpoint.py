"""The committed demo checkpoint: small, right on the bundled pages, and clearly better with zooming than without."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hub_release.demo.checkpoint import LARGEST_BYTES, build_processor, write_card, write_checkpoint
from hub_release.demo.clock import history_of
from hub_release.repository.files import EVALUATION
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from modeling_qzoom.asking.answers import ask
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.metrics import covered_share
from modeling_qzoom.asking.session import Session
from modeling_qzoom.data.drawn.questions import draw_rows


CONFIG = ModelConfig(max_new_tokens=16)
ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
ASSETS = ROOT / "examples" / "assets"


@pytest.fixture(scope="module")
def demo() -> tuple[QZoomForConditionalGeneration, QZoomProcessor]:
    model = QZoomForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval(), QZoomProcessor.from_pretrained(CHECKPOINT)


def test_the_folder_is_small_and_has_presets() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= LARGEST_BYTES
    presets = json.loads((CHECKPOINT / "config.json").read_text())["presets"]
    assert set(presets) == {"fast", "balanced", "accurate"}


@pytest.mark.parametrize("name", ["page", "form"])
def test_the_bundled_pages_are_answered_right(demo, name) -> None:
    bundled = json.loads((ASSETS / f"{name}.json").read_text())
    image = Image.open(ASSETS / bundled["image"]).convert("RGB")
    coarse, fine = list(ask(Session(*demo, CONFIG), [(image, item["question"]) for item in bundled["questions"]]))
    assert [coarse.text, fine.text] == [item["answer"] for item in bundled["questions"]]
    assert [coarse.report.zoomed, fine.report.zoomed] == [False, True]
    assert covered_share(fine.report.box, bundled["questions"][1]["box"]) == 1.0


def test_the_card_is_the_one_that_the_recipe_writes(demo, tmp_path) -> None:
    write_card(tmp_path, history_of(json.loads((CHECKPOINT / EVALUATION / "times.json").read_text())))
    card = (tmp_path / "README.md").read_text()
    assert (CHECKPOINT / "README.md").read_text() == card
    millions = sum(weight.numel() for weight in demo[0].parameters()) / 1e6
    assert f"{millions:.1f} million weights" in card and f"at most {demo[1].max_tokens} visual tokens" in card


def test_zooming_reads_what_the_coarse_view_cannot(demo) -> None:
    rows = list(draw_rows("validation", 99, 24, kinds=("fine",)))
    asked = [(row.page.image, row.question.text) for row in rows]

    def right(**options) -> int:
        return sum(
            answer.text == row.question.answer
            for answer, row in zip(ask(Session(*demo, CONFIG), asked, **options), rows)
        )

    assert right() >= right(zoom="never") + len(rows) // 2


def test_what_is_written_loads_and_has_no_code(tokenizer, model, tmp_path) -> None:
    folder = tmp_path / "demo"
    write_checkpoint(model, build_processor(tokenizer), folder)
    assert not list(folder.glob("*.py"))
    (folder / EVALUATION).mkdir()
    (folder / EVALUATION / "figures.json").write_text("{}")  # what was measured does not disturb loading
    loaded = QZoomForConditionalGeneration.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16 and loaded.config.base_model_name_or_path is None
    processor = QZoomProcessor.from_pretrained(folder)
    assert (processor.min_tokens, processor.max_tokens) == (32, 64)
    image = Image.new("RGB", (900, 700), "white")
    first = build_processor(tokenizer)(images=[image], text="<|vision_start|><|image_pad|><|vision_end|>red 472")
    second = processor(images=[image], text="<|vision_start|><|image_pad|><|vision_end|>red 472")
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])
