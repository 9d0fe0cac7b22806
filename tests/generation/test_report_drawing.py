"""Pictures of reports: over the image, in text and in a notebook."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_qzoom import ZoomReport
from modeling_qzoom.report_drawing_qzoom import caption_lines, heat_colours, notebook_html, overlay, text_picture
from modeling_qzoom.report_qzoom import REASONS


WIDTH, HEIGHT = 600, 400
GREY = Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128))
PLAIN = {"show_crop": False, "show_caption": False}


def zoomed_report(**changes) -> ZoomReport:
    """Heat in the cell of row 1, column 4 of a 4 × 6 grid, cells of 100 × 100 pixels."""
    heatmap = torch.zeros(4, 6)
    heatmap[1, 4] = 0.5
    report = ZoomReport(
        gate_probability=0.875,
        zoomed=True,
        reason="gate_open",
        image_index=0,
        box=(400, 100, 500, 200),
        region_logits=heatmap,
        heatmap=heatmap,
        coarse_tokens=24,
        crop_tokens=36,
    )
    return replace(report, **changes)


def skipped_report(**changes) -> ZoomReport:
    return replace(ZoomReport(gate_probability=0.02, reason="gate_closed", coarse_tokens=24), **changes)


def changed(picture: Image.Image, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """(H, W) bool: where a picture of the grey image differs from it."""
    assert picture.size == size and picture.mode == "RGB"
    return (np.asarray(picture).astype(int) - 128 != 0).any(-1)


def test_heat_lies_on_its_cell():
    report = zoomed_report(box=None)
    tinted = changed(overlay(GREY, report, **PLAIN))
    rows, columns = np.nonzero(tinted)
    assert columns.mean() == pytest.approx(449.5, abs=2) and rows.mean() == pytest.approx(149.5, abs=2)
    assert tinted[110:190, 410:490].all() and not tinted[:, :250].any() and not tinted[320:].any()


def test_heat_under_a_padded_grid():
    """A square grid over a wide image reaches beyond it at top and bottom."""
    heatmap = torch.zeros(6, 6)
    heatmap[2, 4] = 1.0
    report = zoomed_report(box=None, heatmap=heatmap, grid_box=(0, -100, 600, 500))
    rows, columns = np.nonzero(changed(overlay(GREY, report, **PLAIN)))
    assert columns.mean() == pytest.approx(449.5, abs=2) and rows.mean() == pytest.approx(149.5, abs=2)
    central = zoomed_report(box=None, heatmap=torch.ones(4, 4), grid_box=(100, 0, 500, 400))
    tinted = changed(overlay(GREY, central, **PLAIN))
    assert tinted[:, 100:500].all() and not tinted[:, :100].any() and not tinted[:, 500:].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (4, 1)])
def test_heat_of_thin_grids(shape):
    assert changed(overlay(GREY, zoomed_report(box=None, heatmap=torch.ones(shape)), **PLAIN)).all()


def test_box_is_drawn_where_it_is():
    picture = np.asarray(overlay(GREY, zoomed_report(heatmap=None), **PLAIN)).astype(int)
    blue = (np.abs(picture - np.array([0, 190, 255])) < 3).all(-1)
    rows, columns = np.nonzero(blue)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (401, 101, 498, 198)
    assert not blue[110:190, 410:490].any()
    assert changed(Image.fromarray(picture.astype(np.uint8)))[100:200, 400:500][[0, -1]].all()


def test_box_of_the_whole_image_and_of_one_pixel():
    for box in ((0, 0, WIDTH, HEIGHT), (WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT), (0, 0, 1, 1)):
        assert changed(overlay(GREY, zoomed_report(box=box, heatmap=None), **PLAIN)).any()
        overlay(GREY, zoomed_report(box=box))


def test_crop_stands_beside_the_image():
    source = GREY.copy()
    source.paste((255, 0, 0), (400, 100, 500, 200))
    report = zoomed_report(heatmap=None)
    both = np.asarray(overlay(source, report, show_caption=False))
    alone = overlay(source, report, **PLAIN)
    assert both.shape[0] == HEIGHT and np.array_equal(both[:, :WIDTH], np.asarray(alone))
    panel = both[:, -HEIGHT:]  # the box is square, so its enlargement is as wide as the image is high
    assert (panel[20:-20, 20:-20] == [255, 0, 0]).all()


@pytest.mark.parametrize(
    "report",
    [
        skipped_report(),
        skipped_report(heatmap=torch.zeros(4, 6)),
        skipped_report(heatmap=torch.zeros(0, 0)),
        zoomed_report(box=None, zoomed=False, reason="empty_map"),
    ],
)
def test_nothing_to_show_leaves_the_image_plain(report):
    assert not changed(overlay(GREY, report, **PLAIN)).any()
    with_caption = np.asarray(overlay(GREY, report))
    assert (with_caption[:HEIGHT] == 128).all() and with_caption.shape[0] > HEIGHT and with_caption.shape[1] == WIDTH
    assert with_caption[HEIGHT:].max() > 200  # text


@pytest.mark.parametrize("reason", REASONS)
def test_captions(reason):
    zoomed = reason in ("gate_open", "forced")
    report = zoomed_report(reason=reason) if zoomed else skipped_report(reason=reason)
    happened, details = caption_lines(report)
    assert happened.startswith("zoomed:" if zoomed else "not zoomed:")
    assert details == (
        "gate 0.875 | 24 coarse tokens | 36 crop tokens | box 400, 100 to 500, 200 | heat peak 0.50"
        if zoomed
        else "gate 0.020 | 24 coarse tokens"
    )
    assert "gate not run" in caption_lines(replace(report, gate_probability=None))[1]


@pytest.mark.parametrize(
    ("has_gate", "happened", "gate"),
    [
        (True, 'zoomed: zoom="always", the gate was not asked', "gate not run"),
        (False, "zoomed: this checkpoint has no gate", "no gate"),
        (None, "zoomed: without asking the gate", "gate not run"),
    ],
)
def test_the_caption_tells_zoom_always_from_a_checkpoint_without_a_gate(has_gate, happened, gate):
    report = zoomed_report(reason="forced", gate_probability=None, has_gate=has_gate)
    lines = caption_lines(report)
    assert lines[0] == happened and lines[1].startswith(gate + " | ")
    assert happened in text_picture(report) and happened in notebook_html(report).replace("&quot;", '"')


def test_picture_in_text():
    report = zoomed_report(heatmap=torch.tensor([[0.0, 0.05, 0.2], [0.5, 0.02, 0.35]]))
    *caption, first, second = text_picture(report).splitlines()
    assert caption == caption_lines(report)
    assert (first, second) == ("··░░▒▒", "██··▓▓")
    assert str(report) == text_picture(report)


def test_text_of_what_was_not_zoomed():
    """No drawing where nobody looked; a map in which nothing stands out is all dots, however warm its peak is."""
    assert text_picture(skipped_report()).splitlines() == caption_lines(skipped_report())
    empty = zoomed_report(zoomed=False, reason="empty_map", box=None, crop_tokens=0)
    lines = text_picture(empty).splitlines()
    assert lines[0] == "not zoomed: nothing stands out in the heat map" and "heat peak 0.50" in lines[1]
    assert lines[2:] == ["·" * 12] * 4
    assert text_picture(skipped_report(heatmap=torch.zeros(0, 0))).splitlines() == caption_lines(skipped_report())
    assert text_picture(skipped_report(heatmap=torch.zeros(2, 3))).splitlines()[2:] == ["······"] * 2


def test_large_maps_keep_small_regions_in_text():
    heatmap = torch.zeros(60, 121)
    heatmap[59, 120] = 1.0
    drawn = text_picture(zoomed_report(heatmap=heatmap)).splitlines()[2:]
    assert len(drawn) == 20 and {len(line) for line in drawn} == {82}
    assert drawn[-1].endswith("██") and "".join(drawn).count("█") == 2
    assert len(text_picture(zoomed_report(heatmap=heatmap), widest=200).splitlines()) == 62
    with pytest.raises(ValueError, match="widest must be"):
        text_picture(zoomed_report(), widest=0)


def test_notebook():
    """Caption and heat map; the hottest place of the picture is the hottest cell."""
    html = zoomed_report()._repr_html_()
    assert all(line in html for line in caption_lines(zoomed_report()))
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', html)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert picture.size == (6 * 24, 4 * 24) and len(html) < 20_000
    brightness = np.asarray(picture).astype(int).sum(-1)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert (row // 24, column // 24) == (1, 4)
    large = zoomed_report(heatmap=torch.ones(500, 10))._repr_html_()
    assert "<img" in large


@pytest.mark.parametrize(
    "report",
    [skipped_report(), skipped_report(reason="off"), zoomed_report(box=None, zoomed=False, reason="empty_map")],
)
def test_notebook_of_what_was_not_zoomed(report):
    html = report._repr_html_()
    assert "<img" not in html and "not zoomed" in html and 'zoom="never"' not in html  # quotes are escaped


def test_sizes():
    report = zoomed_report(heatmap=torch.ones(4, 6), box=(2000, 100, 2500, 200))
    large = Image.new("RGB", (6000, 300))
    assert overlay(large, report, **PLAIN).size == (1024, 51)
    assert overlay(large, report, max_side=300, **PLAIN).size == (300, 15)
    assert overlay(Image.new("RGB", (12, 6)), skipped_report(), **PLAIN).size == (384, 192)
    sliver = overlay(Image.new("RGB", (1, 3000)), skipped_report())
    assert sliver.width == 384 and 1024 < sliver.height < 1200  # room for its caption
    assert overlay(GREY, zoomed_report()).width <= 2 * WIDTH + 12


def test_kinds_of_images():
    report = zoomed_report()
    expected = overlay(GREY, report)
    tensor = torch.full((3, HEIGHT, WIDTH), 128, dtype=torch.uint8)
    assert overlay(tensor, report).tobytes() == expected.tobytes()
    assert overlay(GREY.convert("L"), report).tobytes() == expected.tobytes()
    assert report.overlay(GREY).tobytes() == expected.tobytes()
    assert GREY.getpixel((450, 150)) == (128, 128, 128)  # the caller's image is untouched
    assert float(report.heatmap.max()) == 0.5


def test_alpha():
    assert not changed(overlay(GREY, zoomed_report(box=None), alpha=0, **PLAIN)).any()
    opaque = overlay(GREY, zoomed_report(box=None, heatmap=torch.ones(4, 6)), alpha=1, **PLAIN)
    assert opaque.getpixel((300, 200)) == (253, 231, 122)


def test_colours_grow_brighter():
    colours = heat_colours(np.linspace(0, 1, 101))
    assert colours.shape == (101, 3) and colours.min() >= 0 and colours.max() <= 255
    assert (np.diff(colours @ [0.2126, 0.7152, 0.0722]) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"alpha": -1}, "alpha must lie in"),
        ({"max_side": 0}, "max_side must be"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        overlay(GREY, zoomed_report(), **options)


def test_another_image_than_the_zoomed_one():
    with pytest.raises(ValueError, match="does not lie in an image of 300 × 200 pixels"):
        overlay(GREY.resize((300, 200)), zoomed_report())
