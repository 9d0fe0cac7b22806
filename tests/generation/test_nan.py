"""Branches that compute NaN never zoom, and the report says so."""

import pytest
import torch

from tests.generation_fixtures import always, mixed
from tests.tiny import FAMILIES, plain_inputs, tiny_model


families = pytest.mark.parametrize("family", FAMILIES)


def _fill(parameter: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


@families
@pytest.mark.parametrize("threshold", [0.0, 0.5, 5.0])
def test_a_gate_that_computes_nan_never_zooms(family, threshold):
    model = tiny_model(family)
    _fill(model.zoom.gate.layers[0].mlp.up_proj.weight, float("nan"))
    inputs, options = mixed(family)
    output = model.generate(
        **inputs, **{**options, "gate_threshold": threshold}, max_new_tokens=3, return_zoom_reports=True
    )
    assert [report.reason for report in output.zoom_reports] == ["gate_nan", "no_image", "gate_nan"]
    assert all(report.gate_probability is None and not report.zoomed for report in output.zoom_reports)
    assert output.sequences.equal(model.vlm.generate(**plain_inputs(inputs), max_new_tokens=3))
    always_zooms = model.generate(**inputs, **always(), max_new_tokens=1, return_zoom_reports=True)
    assert [report.reason for report in always_zooms.zoom_reports] == ["forced", "no_image", "forced"]


@families
def test_a_region_map_of_nan_never_zooms(family):
    model = tiny_model(family)
    _fill(model.zoom.region.scorer.k_proj.weight, float("nan"))
    inputs, _ = mixed(family)
    output = model.generate(**inputs, **always(), max_new_tokens=3, return_zoom_reports=True)
    assert [report.reason for report in output.zoom_reports] == ["map_nan", "no_image", "map_nan"]
    assert "NaN" in str(output.zoom_reports[0]) and output.zoom_reports[0].box is None
    assert output.sequences.equal(model.vlm.generate(**plain_inputs(inputs), max_new_tokens=3))
