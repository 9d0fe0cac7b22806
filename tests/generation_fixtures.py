"""Shared, never changed tiny models and requests for the tests around `generate`."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from modeling_qzoom import QZoomForConditionalGeneration, zoom_decisions_qzoom
from modeling_qzoom.zoom_regions_qzoom import foreground_box
from tests.tiny import Row, make_inputs, plain_inputs, tiny_model


@functools.cache
def shared_model(family: str) -> QZoomForConditionalGeneration:
    """One model per family; tests that change it use `monkeypatch` or `tiny_model`."""
    return tiny_model(family)


def always(**options) -> dict:
    """Options under which every row with an image zooms, into a part of it."""
    return {"zoom": "always", "region_threshold": 0.95, "region_threshold_mode": "peak", **options}


@functools.cache
def _split(family: str) -> tuple[tuple[Row, ...], float]:
    model = shared_model(family)
    rows = [Row(["ask ", None, f" number {seed}?"], [(3, 4) if seed % 2 else (4, 3)], seed) for seed in range(6)]
    inputs = plain_inputs(make_inputs(family, rows))
    logits = model(**inputs, gate_targets=torch.zeros(len(rows))).gate_logits
    ranked = sorted(zip(logits.sigmoid().tolist(), rows), key=lambda pair: pair[0])
    (low, closed), (high, opened) = ranked[0], ranked[-1]
    text = Row(["only words here"], [], 9)
    return (opened, text, closed), (low + high) / 2


def mixed(family: str) -> tuple[dict, dict]:
    """Inputs of three rows (zooms, has no image, skips) and the options that make them do so."""
    rows, threshold = _split(family)
    return make_inputs(family, list(rows)), {**always(zoom="auto"), "gate_threshold": threshold}


def mixed_singles(family: str) -> tuple[list[dict], dict]:
    """The rows of `mixed`, one call each."""
    rows, _ = _split(family)
    return [make_inputs(family, [row]) for row in rows], mixed(family)[1]


def no_zoom(**options) -> dict:
    """Options under which the gate runs and stays closed."""
    return {"zoom": "auto", "gate_threshold": 1.5, **options}


@contextmanager
def record_crops() -> Iterator[list[torch.Tensor]]:
    """Pixel values of the crops made inside the block."""
    crops, original = [], zoom_decisions_qzoom.cut_crop

    def cut_crop(source, box, recipe):
        crop = original(source, box, recipe)
        crops.append(crop.pixel_values)
        return crop

    with patch.object(zoom_decisions_qzoom, "cut_crop", cut_crop):
        yield crops


def box_of(report, threshold: float = 0.95) -> tuple | None:
    """The report's region in cells, as `always` asks for it."""
    return foreground_box(report.heatmap, threshold, "peak")
