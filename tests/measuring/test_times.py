"""Seconds and memory: the right rows zoom, ratios are of neighbouring calls, peaks are seen."""

import pytest
import torch

from modeling_qzoom.measuring.rows import Setting
from modeling_qzoom.measuring.times import compare, markdown, peak_bytes, seconds_of
from tests.tiny import FAMILIES, FAMILY, tiny_model


CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("zooming", [0, 1, 2])
def test_as_many_rows_zoom_as_are_asked_for(family, zooming):
    model = tiny_model(family)
    tokens, crop = (16, 9) if FAMILY[family].has_budget else (16, None)
    row = compare(model, Setting(model.config, tokens, crop, 40), batch=2, zooming=zooming, runs=2)
    assert (row["zooming"], row["batch"], row["source_tokens"]) == (zooming, 2, 16)
    assert (row["flops_over_plain"] > 1.3) == (zooming > 0)
    for name in ("seconds_over_plain", "processor_over_plain", "plain_seconds"):
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    assert 0.5 < row["peak_over_plain"] < 2
    assert len(markdown([row, row]).splitlines()) == 4


def test_a_peak_is_seen_though_it_is_gone_afterwards():
    size = 200 * 2**20
    before = peak_bytes(lambda: None, CPU)
    assert peak_bytes(lambda: torch.ones(size // 4).sum(), CPU) > before + size // 2


def test_seconds():
    wall, spent = seconds_of(lambda: sum(range(10**6)), CPU)
    assert wall > 0 and spent > 0
