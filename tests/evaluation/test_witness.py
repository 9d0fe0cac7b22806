"""The witness: an independent reader says what each view holds; the reader here is a stand-in that needs 12 pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_qzoom.data.drawn.pages import PageSettings
from modeling_qzoom.data.drawn.questions import draw_rows
from modeling_qzoom.evaluation import witness
from modeling_qzoom.evaluation.reader import OcrReader, is_read, line_cut
from modeling_qzoom.evaluation.readings import (
    Looker,
    Reading,
    coarse_size,
    questions_to_read,
    read_rows,
    witness_figures,
)


DEMO = Path(__file__).parents[2] / "hub_release" / "checkpoints" / "qzoom-demo"
SIZES = PageSettings((700, 800), variety="varied", typefaces=("DejaVu Sans",))


class StandIn:
    """Reads every code of some rows where the line is at least 12 pixels tall."""

    def __init__(self, rows) -> None:
        self.text = " ".join(page.entries[question.items[0]].code for page, question in rows)

    def read(self, lines):
        return [self.text if line.height >= 12 else "" for line in lines]


def reading(coarse: bool, source: bool, gate: float | None = None, kind: str = "fine") -> Reading:
    needs = not coarse if coarse or source else None
    return Reading("form", kind, "?", "1", 0.01, coarse, source, None, needs, gate)


def test_a_cut_is_the_line_in_any_view() -> None:
    image = Image.new("RGB", (400, 300), "white")
    image.paste("black", (100, 40, 180, 60))
    whole, part = (0, 0, 400, 300), (80, 20, 280, 120)
    for view, shown, scale in ((image, whole, 1), (image.resize((200, 150)), whole, 0.5), (image.crop(part), part, 1)):
        cut = line_cut(view, (100, 40, 180, 60), shown)
        assert cut.size == pytest.approx((90 * scale, 30 * scale), abs=1)
        dark = (np.asarray(cut.convert("L")) < 128).mean()
        assert dark == pytest.approx(80 * 20 / (90 * 30), abs=0.06)
    assert line_cut(image.crop((200, 100, 300, 200)), (100, 40, 180, 60), (200, 100, 300, 200)) is None


def test_a_code_is_read_where_its_characters_are() -> None:
    assert is_read("k7—204", "K7-204") and is_read(" 856.", "856") and is_read("wait 856 the", "856")
    assert not is_read("85 8", "856") and not is_read("", "856")


def test_the_network_s_classes_become_text() -> None:
    reader = object.__new__(OcrReader)
    reader._characters = ["blank", "8", "5", "6"]
    assert reader._decode(np.array([0, 1, 1, 0, 1, 2, 2, 0, 3])) == "8856"
    assert reader._decode(np.array([0, 0])) == ""


def test_what_only_the_source_shows_needs_a_closer_look() -> None:
    rows = list(questions_to_read("train", 1, 4, SIZES))
    found = list(read_rows(rows, StandIn(rows), tokens=64))
    assert len(found) == 8 and {row.page_kind for row in found[4:]} == {"sizes"}
    for row, (page, question) in zip(found, rows, strict=True):
        scale = coarse_size(page.image, 64)[0] / page.image.width
        box = page.entries[question.items[0]].code_box
        tall = 1.5 * (box[3] - box[1]) * scale
        assert row.source and row.crop is None and row.gate_probability is None
        if abs(tall - 12) > 1.5:
            assert row.coarse == (tall >= 12) and row.needs_closer_look == (tall < 12)
    assert 45000 < np.prod(coarse_size(rows[0][0].image, 64)) < 55000


def test_the_crop_that_the_model_chose_is_read() -> None:
    rows = [(row.page, row.question) for row in draw_rows("test", 1, 3, ("fine",))]
    found = list(read_rows(rows, StandIn(rows), Looker.load(DEMO, 2)))
    assert all(row.source and not row.coarse and 0 <= row.gate_probability <= 1 for row in found)
    assert [row.crop for row in found].count(True) >= 2  # the demo finds most

    class Blind(Looker):
        def crop_view(self, image, box):
            return None

    blind = Looker.load(DEMO, 2)
    lost = list(read_rows(rows[:1], StandIn(rows), Blind(blind.session, blind.recipe)))
    assert lost[0].crop is False


def test_figures_have_rates_labels_and_the_gate_s_area() -> None:
    fine = [reading(False, True), reading(False, True), reading(True, True), reading(False, False)]
    mixed = [reading(False, True, 0.9), reading(True, True, 0.2, "coarse"), reading(False, False, 0.5)]
    figures = witness_figures(fine + mixed, 4)
    assert figures["fine"]["coarse"]["read"] == 0.25 and figures["fine"]["source"]["read"] == 0.75
    low, high = figures["fine"]["source"]["interval"]
    assert low <= 0.75 <= high and "crop" not in figures["fine"]
    assert (
        figures["mixed_sizes"]["rows_with_label"] == 2 and figures["mixed_sizes"]["needs_closer_look"]["share"] == 0.5
    )
    assert (
        figures["mixed_sizes"]["agrees_with_print_size"] == 1.0 and figures["mixed_sizes"]["gate_auroc"]["area"] == 1.0
    )
    assert "mixed_sizes" not in witness_figures(fine, 4)


def test_the_command_writes_every_row(monkeypatch, tmp_path, capsys) -> None:
    rows = list(questions_to_read("test", 3, 2, PageSettings()))
    monkeypatch.setattr(witness, "OcrReader", lambda: StandIn(rows))
    output = tmp_path / "witness.json"
    options = ["--pages", "plain", "--seed", "3", "--rows", "2", "--output", str(output)]
    assert witness.main(options) == 0
    written = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == written["figures"]
    assert len(written["rows"]) == 2 and written["figures"]["fine"]["rows"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "holds no config.json"),
        (["--model", str(DEMO), "--tokens", "64"], "--tokens has no effect with --model"),
        (["--output", "."], "is a folder; name a file"),
    ],
)
def test_what_cannot_be_run_is_one_line(options, message, capsys) -> None:
    assert witness.main(options) == 1
    assert message in capsys.readouterr().err


def test_without_its_packages_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert witness.main(["--rows", "1"]) == 1
    assert "pip install 'qzoom[witness]'" in capsys.readouterr().err
