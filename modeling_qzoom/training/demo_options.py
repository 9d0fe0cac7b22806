"""Chooses the demo's thresholds on validation pages, which neither training nor the published figures see."""

import logging
from dataclasses import dataclass
from typing import Any

from .. import QZoomForConditionalGeneration, QZoomProcessor, ZoomReport
from ..evaluation.demo_figures import accuracy, ask, draw_rows
from ..evaluation.metrics import area_share, region_recall
from ..evaluation.synthetic import Page, Question
from ..regions_qzoom import box_to_pixels, foreground_box
from .demo_checkpoint import CROP_TOKENS
from .demo_data import LARGEST_SEED


REGION_CANDIDATES = (
    *(("absolute", value / 100) for value in (3, 5, 8, 12, 16, 20, 25, 30, 40)),
    *(("peak", value / 100) for value in (20, 30, 40, 50, 60, 65, 70, 75, 80)),
)
MIN_SIDE = 28

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegionScore:
    """How a threshold does: share of targets covered, mean area of its boxes."""

    mode: str
    threshold: float
    recall: float
    area: float


def score_region(
    reports: list[ZoomReport], rows: list[tuple[Page, Question]], mode: str, threshold: float
) -> RegionScore:
    """What boxes a threshold would have given, from the heat maps of finished calls."""
    boxes = []
    for report, (page, _) in zip(reports, rows, strict=True):
        cells = foreground_box(report.heatmap, threshold, mode)
        size = (page.image.height, page.image.width)
        boxes.append(None if cells is None else box_to_pixels(cells, tuple(report.heatmap.shape), size, MIN_SIDE))
    areas = [area_share(box, page.image.size) for box, (page, _) in zip(boxes, rows, strict=True) if box is not None]
    recall = region_recall(boxes, [question.box for _, question in rows])
    return RegionScore(mode, threshold, recall, sum(areas) / max(1, len(areas)))


def gate_threshold(fine: list[float], coarse: list[float]) -> float:
    """The probability that separates fine from coarse questions with the fewest errors, midway in its gap."""
    values = sorted({0.0, 1.0, *fine, *coarse})
    middles = [(low + high) / 2 for low, high in zip(values, values[1:], strict=False)]
    errors = [sum(p < t for p in fine) / len(fine) + sum(p >= t for p in coarse) / len(coarse) for t in middles]
    fewest = min(errors)
    best = [middle for middle, error in zip(middles, errors, strict=True) if error == fewest]
    return best[len(best) // 2]


def choose_options(
    model: QZoomForConditionalGeneration, processor: QZoomProcessor, pages: int = 100, first_seed: int = LARGEST_SEED
) -> dict[str, Any]:
    """Config fields for the demo: gate threshold, region threshold and mode, and presets.

    Region thresholds are ranked by the answers they lead to; of the candidates only those with the best recall are
    tried.
    """
    rows = draw_rows(first_seed, pages)
    fine = [row for row in rows if row[1].kind == "fine"]
    _, reports = ask(model, processor, fine, zoom="always")
    scores = [score_region(reports, fine, mode, threshold) for mode, threshold in REGION_CANDIDATES]
    for score in scores:
        logger.info("%s", score)
    enough = max(score.recall for score in scores) - 0.02
    tried = sorted((score for score in scores if score.recall >= enough), key=lambda score: score.area)[:4]
    best, reached = tried[0], -1.0
    for score in tried:
        options = {"region_threshold": score.threshold, "region_threshold_mode": score.mode}
        answers, _ = ask(model, processor, fine, zoom="always", **options)
        right = accuracy(answers, fine)
        logger.info("%s answers %.3f", score, right)
        if right > reached:
            best, reached = score, right
    _, gated = ask(model, processor, rows, zoom="auto")
    chances = [report.gate_probability for report in gated]
    gate = gate_threshold(chances[::2], chances[1::2])
    spread = {"fast": (1 + gate) / 2, "balanced": gate, "accurate": gate / 2}
    presets = {
        name: {"gate_threshold": round(spread[name], 4), "crop_max_tokens": tokens}
        for name, tokens in CROP_TOKENS.items()
    }
    return {
        "gate_threshold": round(gate, 4),
        "region_threshold": best.threshold,
        "region_threshold_mode": best.mode,
        "presets": presets,
    }
