"""Parity with the authors' code, from their checkpoint format to generated tokens."""

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from torch import Tensor

from hub_release.convert_official import convert
from modeling_qzoom import QZoomForConditionalGeneration, zoom_decisions_qzoom, zoom_second_pass_qzoom
from modeling_qzoom.prompt_qzoom import marker_ids
from modeling_qzoom.zoom_crops_qzoom import Crop, crop_recipe, cut_crop
from modeling_qzoom.zoom_options_qzoom import ZoomOptions
from modeling_qzoom.zoom_regions_qzoom import foreground_box, no_artifacts, region_heatmap
from tests.golden import CASES, GoldenCase, load_case


TOLERANCE = 1e-4
END_TOKEN = 127
STEPS = 6
ALIGNMENTS = {"zoom_aligned": "continuous", "zoom_sequential": "sequential"}

_case = cache(load_case)


@pytest.fixture(scope="module", params=CASES)
def golden(request, tmp_path_factory) -> tuple[GoldenCase, QZoomForConditionalGeneration]:
    """A case, and its converted checkpoint loaded from the written folder."""
    case = _case(request.param)
    work = tmp_path_factory.mktemp(case.name)
    convert(case.write_checkpoint(work / "official"), work / "converted")
    return case, QZoomForConditionalGeneration.from_pretrained(work / "converted")


@dataclass
class Trace:
    """Intermediate values of one generation that its outputs do not show."""

    cells: tuple | None = None
    crop_grid: tuple | None = None
    artifact_mask: Tensor | None = None
    source_positions: Tensor | None = None
    fused_positions: Tensor | None = None
    fused_ids: list[int] = field(default_factory=list)


def _record(monkeypatch) -> Trace:
    """Listens at the seams between region, fusion and second pass."""
    trace = Trace()
    plan_rows, heatmap = zoom_second_pass_qzoom.plan_rows, region_heatmap

    def recording_plan(model, request, view, crops):
        rows = plan_rows(model, request, view, crops)
        row, ids = rows[0], view.input_ids[0]
        inserted = [model.config.image_token_id] * row.crop
        if row.has_markers:
            before, after = marker_ids(model.config)
            inserted = [before, *inserted, after]
        trace.fused_ids = [*ids[row.prefix].tolist(), *inserted, *ids[row.suffix].tolist()]
        trace.cells, trace.crop_grid = crops[0].cells, crops[0].crop.patch_grid
        trace.source_positions, trace.fused_positions = view.positions.row(0), row.positions
        return rows

    def recording_heatmap(logits, first_token_logits, artifact_rule):
        trace.artifact_mask = artifact_rule(torch.ones_like(logits), first_token_logits)
        return heatmap(logits, first_token_logits, artifact_rule)

    monkeypatch.setattr(zoom_second_pass_qzoom, "plan_rows", recording_plan)
    monkeypatch.setattr(zoom_decisions_qzoom, "region_heatmap", recording_heatmap)
    return trace


def _generate(case: GoldenCase, model, **options):
    return model.generate(
        **case.inputs(model.config.image_token_id),
        **options,
        region_threshold=case.settings["roi_conf_thresh"],
        return_zoom_reports=True,
        output_logits=True,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=[END_TOKEN],
    )


def _zoom(case: GoldenCase, model, run: str):
    return _generate(case, model, gate_threshold=0.0, position_alignment=ALIGNMENTS[run])


def _logits(output) -> Tensor:
    return torch.stack(output.logits)[:, 0]  # (steps, vocabulary)


def _share_of_range(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of their range."""
    return ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item()


def _assert_generated(case: GoldenCase, run: str, output) -> None:
    expected = case.expected[f"{run}.logits"]
    for step, logits in enumerate(_logits(output)):
        assert _share_of_range(logits, expected[step]) < TOLERANCE, f"step {step}"
    prompt = case.expected["input_ids"].shape[1]
    assert torch.equal(output.sequences[0, prompt:], case.expected[f"{run}.new_tokens"])
    probability = case.expected[f"{run}.gate_probability"].item()
    assert output.zoom_reports[0].gate_probability == pytest.approx(probability, abs=TOLERANCE)


def test_config_comes_from_the_authors_files(golden):
    case, model = golden
    area = {14: 28**2, 16: 32**2}[case.settings["patch_size"]]
    layers = {"a": (3, 3), "b": (2, 2), "c": (3, 1)}
    if case.name == "qwen3_vl_b":
        layers["b"] = (4, 2)
    assert (model.config.branch_layer, model.config.branch_depth) == layers[case.name[-1]]
    assert model.config.has_gate
    assert model.config.position_alignment == "continuous"
    assert model.config.min_tokens * area == case.settings["min_pixels"]
    assert model.config.max_tokens * area == case.settings["max_pixels"]
    assert model.config.image_mean == pytest.approx(case.settings["image_mean"])
    assert model.config.image_std == pytest.approx(case.settings["image_std"])


def test_gate_closed(golden):
    case, model = golden
    output = _generate(case, model, gate_threshold=2.0)
    _assert_generated(case, "gate_closed", output)
    assert output.zoom_reports[0].reason == "gate_closed"


@pytest.mark.parametrize("run", ALIGNMENTS)
def test_zoom_with_the_authors_crop(golden, run, monkeypatch):
    case, model = golden
    expected = {key.removeprefix(f"{run}."): value for key, value in case.expected.items() if key.startswith(run)}
    trace = _record(monkeypatch)
    grid = tuple(expected["crop_grid"].tolist())
    tokens = grid[1] // 2, grid[2] // 2
    recorded = lambda source, box, recipe: Crop(box, case.crop_pixels, grid, tokens)  # noqa: E731
    monkeypatch.setattr(zoom_decisions_qzoom, "cut_crop", recorded)
    output = _zoom(case, model, run)
    report = output.zoom_reports[0]

    assert report.reason == "gate_open"
    assert (report.region_logits - expected["region_logits"]).abs().max() < TOLERANCE
    if "artifact_mask" in expected:
        assert torch.equal(trace.artifact_mask, expected["artifact_mask"])
    assert list(trace.cells) == expected["box"].tolist()
    assert list(report.box) == expected["crop_box_pixels"].tolist()
    assert torch.equal(trace.source_positions, expected["source_position_ids"])
    assert torch.equal(trace.fused_positions, expected["fused_position_ids"])
    assert trace.fused_ids == expected["fused_input_ids"].tolist()
    _assert_generated(case, run, output)


@pytest.mark.parametrize("run", ALIGNMENTS)
def test_zoom_with_our_own_crop(golden, run, monkeypatch):
    case, model = golden
    trace = _record(monkeypatch)
    ours = _logits(_zoom(case, model, run))[0]
    assert list(trace.crop_grid) == case.expected[f"{run}.crop_grid"].tolist()
    theirs = {name: case.expected[f"{name}.logits"][0] for name in ALIGNMENTS}
    spread = (theirs["zoom_aligned"] - theirs["zoom_sequential"]).abs().max().item()
    extent = (theirs[run].max() - theirs[run].min()).item()
    assert (ours - theirs[run]).abs().max().item() < min(0.03 * extent, spread / 4)


def test_crops_are_within_a_grey_level(golden):
    case, model = golden
    recipe = crop_recipe(model.config, ZoomOptions())
    box = tuple(case.expected["zoom_aligned.crop_box_pixels"].tolist())
    crop = cut_crop(case.source, box, recipe)
    assert list(crop.patch_grid) == case.expected["zoom_aligned.crop_grid"].tolist()
    grey_levels = 255 * torch.tensor(recipe.std).view(3, 1, 1, 1)
    patch = case.settings["patch_size"]
    difference = (crop.pixel_values - case.crop_pixels).view(-1, 3, 2, patch, patch).abs() * grey_levels
    assert difference.max() < 1.001


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("b")])
def test_the_artifact_rule_decides_the_box_of_b(name):
    """So that the box above is a test of the rule."""
    case = _case(name)
    heatmap = region_heatmap(case.expected["zoom_aligned.region_logits"], None, no_artifacts)
    box = foreground_box(heatmap, case.settings["roi_conf_thresh"], "absolute")
    assert list(box) != case.expected["zoom_aligned.box"].tolist()
