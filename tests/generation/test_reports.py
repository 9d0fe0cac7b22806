"""One report per prompt row: every reason, and values that outlive the model."""

import copy
import json
import pickle
from dataclasses import fields

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from modeling_qzoom import ZoomReport
from tests.families import FAMILY
from tests.generation_fixtures import always, mixed, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


families = pytest.mark.parametrize("family", FAMILIES)


def reports_of(family, inputs, **options):
    return (
        shared_model(family)
        .generate(**inputs, **{"max_new_tokens": 1, "return_zoom_reports": True, **options})
        .zoom_reports
    )


def one_row(family, **changes):
    return {**make_inputs(family, [Row(["look ", None, " here"], [(3, 4)], 1)]), **changes}


@families
def test_gates_and_missing_images(family):
    inputs, options = mixed(family)
    opened, text, closed = reports_of(family, inputs, **options)
    assert (opened.reason, text.reason, closed.reason) == ("gate_open", "no_image", "gate_closed")
    assert opened.gate_probability >= options["gate_threshold"] > closed.gate_probability
    assert text == ZoomReport(reason="no_image")
    assert closed.zoomed is False and closed.box is closed.heatmap is closed.region_logits is None
    assert closed.coarse_tokens > 0 and closed.crop_tokens == 0 and closed.image_index is None


@families
def test_forced_and_off(family):
    forced = reports_of(family, one_row(family), **always())[0]
    assert (forced.reason, forced.zoomed, forced.gate_probability) == ("forced", True, None)
    off = reports_of(family, plain_inputs(one_row(family)), zoom="never")[0]
    assert off == ZoomReport(reason="off", coarse_tokens=forced.coarse_tokens)


@families
def test_zoom_always_and_no_gate_are_told_apart(family):
    always_report = reports_of(family, one_row(family), **always())[0]
    assert always_report.has_gate is True and 'zoom="always"' in str(always_report)
    gateless = tiny_model(family, has_gate=False)
    options = {"region_threshold": 0.6, "region_threshold_mode": "peak", "max_new_tokens": 1}
    report = gateless.generate(**one_row(family), **options, return_zoom_reports=True).zoom_reports[0]
    assert (report.reason, report.has_gate) == ("forced", False) and "no gate" in str(report)


@families
def test_empty_map(family):
    """Nothing above the threshold: answered from the coarse view, exactly as the plain backbone does."""
    options = {"zoom": "always", "region_threshold": 1.0, "skip_unread": False, "max_new_tokens": 4}
    output = shared_model(family).generate(**one_row(family), **options, return_zoom_reports=True, output_logits=True)
    report = output.zoom_reports[0]
    assert (report.reason, report.zoomed, report.box, report.crop_tokens) == ("empty_map", False, None, 0)
    assert report.heatmap is not None and report.image_index == 0
    plain = shared_model(family).vlm.generate(
        **plain_inputs(one_row(family)), max_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    assert torch.stack(output.logits).equal(torch.stack(plain.logits))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_region_that_is_too_narrow_fails_and_falls_back(family):
    """6000 × 2 pixels: beyond the aspect ratio that the backbone's image processor accepts."""
    strip = torch.zeros(3, 2, 6000, dtype=torch.uint8)
    inputs = make_inputs(family, [Row(["a", None, "b"], [(3, 4)], 1), Row([None, "c"], [(2, 2)], 2)])
    whole = {"zoom": "always", "region_threshold": 0.0, "region_threshold_mode": "peak", "max_new_tokens": 4}
    mixed_sources = {**inputs, "source_images": [strip, inputs["source_images"][1]]}
    output = shared_model(family).generate(**mixed_sources, **whole, return_zoom_reports=True)
    failed, zoomed = output.zoom_reports
    assert (failed.reason, failed.zoomed, failed.box, failed.crop_tokens) == ("crop_failed", False, (0, 0, 6000, 2), 0)
    assert zoomed.zoomed
    plain = shared_model(family).vlm.generate(
        **plain_inputs(make_inputs(family, [Row(["a", None, "b"], [(3, 4)], 1)])), max_new_tokens=4
    )
    assert output.sequences[0, -4:].equal(plain[0, -4:])


def test_a_region_in_the_padding_fails_and_falls_back():
    """The rectangle under the grid lies beside the image."""
    beside = torch.tensor([[1000, 1000, 1400, 1400]])
    report = reports_of("llava", one_row("llava", source_boxes=beside), **always())[0]
    assert (report.reason, report.zoomed, report.box) == ("crop_failed", False, None)
    assert report.heatmap.shape == (4, 4) and report.grid_box == (1000, 1000, 1400, 1400)


@families
def test_values_are_python_numbers_and_cpu_float32(family):
    inputs, options = mixed(family)
    for report in reports_of(family, inputs, **options):
        for field in fields(report):
            value = getattr(report, field.name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == torch.float32 and value.device.type == "cpu" and not value.requires_grad
            elif isinstance(value, tuple):
                assert all(type(item) in (int, float) for item in value)
            else:
                assert type(value) in (int, float, bool, str, type(None))
        assert pickle.loads(pickle.dumps(report)).reason == copy.deepcopy(report).reason == report.reason
        json.dumps([report.gate_probability, report.zoomed, report.box, report.coarse_tokens, report.crop_tokens])


@families
def test_maps_boxes_and_counts_fit_each_other(family):
    inputs = make_inputs(family, [Row(["a", None, "b", None, "?"], [(2, 3), (4, 5)], 1)])
    report = reports_of(family, inputs, **always())[0]
    grids = FAMILY[family].grids((2, 3), (4, 5))
    assert report.region_logits.shape == report.heatmap.shape == grids[report.image_index]
    assert 0 <= report.heatmap.min() and report.heatmap.max() <= 1
    assert report.coarse_tokens == sum(height * width for height, width in grids)
    _, height, width = inputs["source_images"][report.image_index].shape
    x0, y0, x1, y1 = report.box
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and min(x1 - x0, y1 - y0) >= 28
    assert report.crop_tokens > 0 and report.grid_box is None


@families
def test_the_image_with_the_peak_is_zoomed_into(family):
    """Whichever comes first: swapping two images swaps the index."""
    model, row = shared_model(family), Row([None, None, "which?"], [(3, 3), (3, 3)], 1)
    seen = set()
    for seed in range(12):
        inputs = make_inputs(family, [Row(row.pieces, row.grids, seed)])
        report = reports_of(family, inputs, **always())[0]
        logits = model(**plain_inputs(inputs), region_targets=[[torch.zeros(1, 1, 1)] * 2]).region_logits[0]
        assert report.region_logits.equal(logits[report.image_index][0].float()) or torch.allclose(
            report.region_logits, logits[report.image_index][0].float(), atol=1e-4
        )
        seen.add(report.image_index)
    assert seen == {0, 1}


@families
def test_reports_imply_a_dict_output(family):
    inputs, options = mixed(family)
    model = shared_model(family)
    output = model.generate(**inputs, **options, max_new_tokens=1, return_zoom_reports=True)
    assert output["zoom_reports"] is output.zoom_reports and output.sequences.ndim == 2
    same = model.generate(
        **inputs, **options, max_new_tokens=1, return_zoom_reports=True, return_dict_in_generate=True
    )
    assert same.sequences.equal(output.sequences)
    without = model.generate(**inputs, **options, max_new_tokens=1, return_dict_in_generate=True)
    assert "zoom_reports" not in without


@families
def test_an_explicit_tensor_output_cannot_carry_reports(family):
    with pytest.raises(ValueError, match="needs a dict output.*pipelines.*call model.generate directly"):
        reports_of(family, one_row(family), return_dict_in_generate=False, **always())


@families
@pytest.mark.parametrize("settings", [{"num_beams": 2, "num_return_sequences": 2}, {"num_beams": 3}])
def test_one_report_per_row_not_per_beam(family, settings):
    inputs, options = mixed(family)
    greedy = reports_of(family, inputs, **options)
    beams = reports_of(family, inputs, **options, **settings)
    assert [report.reason for report in beams] == [report.reason for report in greedy]
    assert [report.box for report in beams] == [report.box for report in greedy]
    text = make_inputs(family, [Row(["words"], [], 0)])
    assert reports_of(family, text, **settings) == [ZoomReport(reason="no_image")]
    assert len(reports_of(family, one_row(family), zoom="never", **settings)) == 1


@families
def test_text_only_batches(family):
    text = make_inputs(family, [Row(["words"], [], 0), Row(["more words"], [], 0)])
    for zoom in ("auto", "always", "never"):
        assert reports_of(family, text, zoom=zoom) == [ZoomReport(reason="no_image")] * 2


def test_one_line_representation():
    """Tensors by shape, and nothing that says nothing: lists of reports stay readable."""
    assert repr(ZoomReport(reason="no_image")) == "ZoomReport(reason='no_image', zoomed=False)"
    report = ZoomReport(0.25, True, "gate_open", 0, (1, 2, 30, 40), heatmap=torch.zeros(3, 4), coarse_tokens=12)
    assert repr(report) == (
        "ZoomReport(reason='gate_open', zoomed=True, gate_probability=0.25, image_index=0, box=(1, 2, 30, 40), "
        "heatmap=<(3, 4)>, coarse_tokens=12)"
    )
    assert f"{[report]}" == f"[{report!r}]"


@families
def test_text_and_notebook_of_a_real_report(family):
    report = reports_of(family, one_row(family), **always())[0]
    rows, columns = report.heatmap.shape
    drawn = str(report).splitlines()[2:]
    assert len(drawn) == rows and {len(line) for line in drawn} == {2 * columns}
    assert "<img" in report._repr_html_()
    held = [value for value in vars(report).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) == 2 * rows * columns  # maps, no image


@families
def test_overlay(family):
    inputs = one_row(family)
    report = reports_of(family, inputs, **always())[0]
    assert report.overlay(inputs["source_images"][0]).mode == "RGB"


class Watcher(StoppingCriteria):
    def __init__(self):
        self.known = []

    def __call__(self, input_ids, scores, **kwargs):
        self.known.append([report.reason for report in self.reports])
        return torch.zeros(len(input_ids), dtype=torch.bool)


@families
def test_reports_are_there_before_the_first_word(family):
    """For a streamer or a stopping criterion; for rows that zoom and for calls that never do."""
    inputs, options = mixed(family)
    for call in (options, {"zoom": "never"}):
        reports, watcher = [], Watcher()
        watcher.reports = reports
        criteria = StoppingCriteriaList([watcher])
        shared_model(family).generate(
            **inputs, **call, max_new_tokens=2, zoom_reports=reports, stopping_criteria=criteria
        )
        assert list(map(repr, reports)) == list(map(repr, reports_of(family, inputs, **call)))
        assert watcher.known[0] == watcher.known[-1] == [report.reason for report in reports]
        with pytest.raises(ValueError, match="zoom_reports must be an empty list"):
            shared_model(family).generate(**inputs, **call, max_new_tokens=1, zoom_reports=reports)


def test_a_report_becomes_json():
    report = reports_of("qwen2_5_vl", one_row("qwen2_5_vl"), **always())[0]
    told = json.loads(json.dumps(report.to_dict()))
    assert told["reason"] == "forced" and told["box"] == list(report.box) and told["crop_tokens"] > 0
    assert "heatmap" not in told and "region_logits" not in told
    assert torch.equal(torch.tensor(report.to_dict(maps=True)["heatmap"]), report.heatmap)
    assert ZoomReport().to_dict(maps=True)["heatmap"] is None
