"""Blur by grid size, smallest peak, smallest peak over mean: as Vision-RL² has them, and as options of a call."""

import math

import pytest
import torch
from transformers import GenerationConfig

from modeling_qzoom.zoom_options_qzoom import ZoomOptions
from modeling_qzoom.zoom_regions_qzoom import (
    blur,
    box_to_pixels,
    find_region,
    grid_sigma,
    region_heatmap,
    zero_page_corner,
)
from tests.generation_fixtures import always, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model
from tests.visionrl2 import CASES, RegionCase, load_case


families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(params=CASES)
def case(request) -> RegionCase:
    return load_case(request.param)


def rules_of(case: RegionCase) -> ZoomOptions:
    return ZoomOptions(
        region_threshold=case.settings["dynamic_peak_fraction"],
        region_threshold_mode="peak",
        region_blur="grid",
        region_min_peak=case.settings["dynamic_min_gate"],
        region_min_contrast=case.settings["dynamic_ratio_thresh"],
    )


def test_maps_and_boxes_of_visionrl2(case):
    logits = case.expected["region_logits"]
    sigma = grid_sigma(logits.numel())
    assert sigma == pytest.approx(case.expected["blur_sigma"].item())
    heatmap = region_heatmap(logits, None, zero_page_corner, sigma)
    assert (heatmap - case.expected["heatmap"]).abs().max() < 1e-6
    assert float(heatmap.max() / heatmap.mean()) == pytest.approx(case.expected["peak_over_mean"].item(), rel=1e-5)
    box, rule = find_region(heatmap, rules_of(case))
    assert rule is None and list(box) == case.values("box")
    pixels = box_to_pixels(box, tuple(logits.shape), case.image_size, 28, cell_side=case.token_side)
    assert list(pixels) == case.values("crop_box_pixels")


def test_kernels_of_visionrl2(case):
    """A single lit cell spreads as far as the recorded kernel reaches."""
    lit = torch.zeros(31, 31)
    lit[15, 15] = 1
    spread = blur(lit, case.expected["blur_sigma"].item()) > 0
    assert [int(spread.any(1).sum()), int(spread.any(0).sum())] == case.values("blur_kernel")


def test_pixel_boxes_round_as_the_authors_do():
    """620 / 20 · 2 is 62; in float32, 28 pixels a cell in between, it is just below, and so is the box."""
    assert box_to_pixels((2, 0, 12, 3), (13, 20), (400, 620), 28) == (61, 0, 371, 92)
    assert box_to_pixels((2, 0, 12, 3), (13, 20), (400, 620), 28, cell_side=32) == (62, 0, 372, 92)


@pytest.mark.parametrize(
    ("cells", "sigma", "kernel"),
    [
        (1, 1, 3),
        (512, 1, 3),
        (576, 1.042, 3),
        (1024, 1.333, 5),
        (2048, 2, 7),
        (4096, 2.828, 9),
        (8192, 4, 13),
        (16384, 4, 13),
    ],
)
def test_blur_by_grid_size(cells, sigma, kernel):
    assert grid_sigma(cells) == pytest.approx(sigma, abs=5e-4)
    lit = torch.zeros(31, 31)
    lit[15, 15] = 1
    blurred = blur(lit, grid_sigma(cells))
    assert int((blurred[15] > 0).sum()) == kernel
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    ratio = float(blurred[15, 14] / blurred[15, 15])
    assert ratio == pytest.approx(math.exp(-1 / (2 * grid_sigma(cells) ** 2)), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (2, 40), (3, 7), (5, 5)])
@pytest.mark.parametrize("sigma", [1.0, 1.5, 4.0])
def test_wide_blurs_keep_constant_maps_of_every_shape(shape, sigma):
    torch.testing.assert_close(blur(torch.full(shape, 0.3), sigma), torch.full(shape, 0.3))


@pytest.mark.parametrize("sigma", [1.0, 1.3, 2.0, 4.0])
def test_blur_equals_a_sum_over_mirrored_cells(sigma):
    generator = torch.Generator().manual_seed(0)
    heatmap = torch.rand(6, 9, generator=generator)
    reach = max(3, round(3 * sigma)) // 2

    def along(side: int) -> torch.Tensor:
        """(side, side) weights of one axis."""
        matrix = torch.zeros(side, side, dtype=torch.float64)
        mirror = [*range(side), *range(side - 2, 0, -1)]
        inside = min(reach, side - 1)
        for cell in range(side):
            for distance in range(-inside, inside + 1):
                weight = math.exp(-(distance**2) / (2 * sigma**2))
                matrix[cell, mirror[(cell + distance) % len(mirror)]] += weight
        return matrix / matrix.sum(1, keepdim=True)

    expected = along(6) @ heatmap.double() @ along(9).T
    torch.testing.assert_close(blur(heatmap, sigma).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "rules", "expected"),
    [
        ([0.1, 0.0, 0.0, 0.0], {"region_min_peak": 0.1}, None),
        ([0.1, 0.0, 0.0, 0.0], {"region_min_peak": 0.11}, "region_min_peak"),
        ([0.4, 0.0, 0.0, 0.0], {"region_min_contrast": 3.99}, None),
        ([0.4, 0.1, 0.0, 0.0], {"region_min_contrast": 3.3}, "region_min_contrast"),
        ([0.4, 0.1, 0.0, 0.0], {"region_min_contrast": 3.1}, None),
        ([0.1, 0.1, 0.1, 0.1], {"region_min_peak": 0.2, "region_min_contrast": 2}, "region_min_peak"),
        ([0.1, 0.1, 0.1, 0.1], {"region_min_contrast": 2, "region_threshold": 0.5}, "region_min_contrast"),
        ([0.1, 0.0, 0.0, 0.0], {"region_threshold": 0.5}, "region_threshold"),
        ([0.0, 0.0, 0.0, 0.0], {}, "region_threshold"),
        ([0.0, 0.0, 0.0, 0.0], {"region_min_contrast": 3}, "region_min_contrast"),
    ],
)
def test_the_rule_that_leaves_a_map_empty_is_named(values, rules, expected):
    options = ZoomOptions(**{"region_threshold": 0.05, **rules})
    box, rule = find_region(torch.tensor([values]), options)
    assert rule == expected and (box is None) is (expected is not None)


def one_row(family: str, grid=(3, 4)) -> dict:
    return make_inputs(family, [Row(["look ", None, " here"], [grid], 1)])


def report_of(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=1, return_zoom_reports=True, **options).zoom_reports[0]


@families
@pytest.mark.parametrize("name", ["region_min_peak", "region_min_contrast"])
def test_maps_below_a_minimum_are_answered_from_the_coarse_view(family, name):
    model, inputs = shared_model(family), one_row(family)
    heatmap = report_of(model, inputs, **always()).heatmap
    reached = float(heatmap.max()) if name == "region_min_peak" else float(heatmap.max() / heatmap.mean())
    zoomed = report_of(model, inputs, **always(), **{name: reached * 0.999})
    assert zoomed.zoomed and zoomed.empty_rule is None
    settings = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    options = always(skip_unread=False, return_zoom_reports=True, **{name: reached * 1.001})
    output = model.generate(**inputs, **options, **settings)
    report = output.zoom_reports[0]
    assert (report.reason, report.empty_rule, report.zoomed, report.box) == ("empty_map", name, False, None)
    assert name in str(report)  # the caption says what to lower
    plain = model.vlm.generate(**plain_inputs(inputs), **settings)
    assert torch.stack(output.logits).equal(torch.stack(plain.logits))


@families
def test_rows_of_one_batch_fall_back_by_themselves(family):
    model = shared_model(family)
    rows = [Row(["see ", None, "a?"], [(3, 4)], seed=1), Row([None, "and this?"], [(4, 3)], seed=2)]
    inputs = make_inputs(family, rows)
    reports = model.generate(**inputs, **always(), max_new_tokens=1, return_zoom_reports=True).zoom_reports
    peaks = [float(report.heatmap.max()) for report in reports]
    options = always(region_min_peak=sum(peaks) / 2)
    reports = model.generate(**inputs, **options, max_new_tokens=1, return_zoom_reports=True).zoom_reports
    assert [report.zoomed for report in reports] == [peak == max(peaks) for peak in peaks]
    assert [report.empty_rule for report in reports] == [
        None if peak == max(peaks) else "region_min_peak" for peak in peaks
    ]


def test_the_wide_blur_reaches_the_report_on_large_grids_only():
    model = shared_model("qwen2_5_vl")
    for grid, changes in (((16, 32), False), ((20, 32), True)):
        inputs = one_row("qwen2_5_vl", grid)
        usual = report_of(model, inputs, **always()).heatmap
        wide = report_of(model, inputs, **always(), region_blur="grid").heatmap
        assert usual.equal(wide) is not changes
        logits = report_of(model, inputs, **always()).region_logits
        expected = region_heatmap(logits, None, zero_page_corner, grid_sigma(logits.numel()))
        torch.testing.assert_close(wide, expected)


def test_the_rules_stand_in_every_place(tmp_path):
    """Config, preset, generation config and call, the last one winning; saved and loaded."""
    rules = {"region_blur": "grid", "region_min_peak": 0.999, "region_min_contrast": 2.5}
    model = tiny_model("qwen2_5_vl", presets={"strict": rules})
    inputs = one_row("qwen2_5_vl")
    assert report_of(model, inputs, **always()).zoomed
    assert report_of(model, inputs, **always(), effort="strict").empty_rule == "region_min_peak"
    settings = GenerationConfig(**always(), **rules, max_new_tokens=1)
    output = model.generate(**inputs, generation_config=settings, return_zoom_reports=True)
    assert output.zoom_reports[0].empty_rule == "region_min_peak"
    low = {"region_min_peak": 0, "region_min_contrast": 0}
    output = model.generate(**inputs, generation_config=settings, return_zoom_reports=True, **low)
    assert output.zoom_reports[0].zoomed
    for name, value in rules.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in rules} == rules
    assert report_of(loaded, inputs, **always()).empty_rule == "region_min_peak"
