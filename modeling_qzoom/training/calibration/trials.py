"""Which ways to zoom are tried on held-out rows, and the points that they give."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import QZoomConfig
from ...asking.session import Session
from ...data.rows import Row
from .candidates import Candidate, Ranked, rank_candidates
from .config import CalibrateConfig
from .costs import cost_under
from .operating_points import Outcomes, Point, gated_points, single_point
from .passes import Coarse, Passes


logger = logging.getLogger(__name__)


def region_candidates(config: CalibrateConfig, model: QZoomConfig) -> list[Candidate]:
    """The region thresholds of the options, and the model's own."""
    candidates = [
        Candidate(mode, threshold) for mode, thresholds in config.region_thresholds.items() for threshold in thresholds
    ]
    return list(dict.fromkeys([*candidates, Candidate(model.region_threshold_mode, model.region_threshold)]))


def crop_budgets(config: CalibrateConfig, model: QZoomConfig) -> list[dict[str, int]]:
    """Crop budgets to try, as options of `generate`; the smallest bound gives way where it is larger.

    Raises:
        ValueError: budgets for a backbone whose crops have one size.
    """
    if not model.backbone.grid.has_budget:
        if config.crop_max_tokens:
            raise ValueError("crop_max_tokens: crops of this backbone always have one size; leave it out.")
        return [{}]
    largest = model.crop_max_tokens or model.max_tokens
    budgets = config.crop_max_tokens or ([] if largest is None else [largest])
    if not budgets:
        raise ValueError("The crop's budget is unknown: list the budgets to try in crop_max_tokens.")
    low = model.crop_min_tokens
    return [
        {"crop_max_tokens": high, **({} if low is None else {"crop_min_tokens": min(low, high)})}
        for high in sorted(set(budgets))
    ]


def rank_regions(
    config: CalibrateConfig, candidates: Sequence[Candidate], coarse: Sequence[Coarse], rows: Sequence[Row]
) -> list[Ranked]:
    """The region thresholds that are worth decoding with, told from the rows that the plain model gets wrong.

    Raises:
        ValueError: none makes boxes as small as `largest_area` asks for.
    """
    wrong = [row for row in coarse if not row.right] or coarse
    boxes, sizes = [row.boxes for row in wrong], [row.size for row in wrong]
    targets = [rows[row.place].box for row in wrong]
    return rank_candidates(candidates, boxes, sizes, targets, config.largest_area)


def closed_outcomes(session: Session, coarse: Sequence[Coarse]) -> Outcomes:
    """What rows give whose gates stay closed."""
    cost = cost_under(session, {})
    spent = cost.plain if session.model.zoom.gate is None else cost.skipped
    return Outcomes.of_rows((row.right, False, row.prompt.visual, spent(row.prompt)) for row in coarse)


def measure_points(
    passes: Passes, coarse: Sequence[Coarse], closed: Outcomes, ranked: Sequence[Ranked], budgets: list[dict[str, int]]
) -> list[Point]:
    """Every point: the ranked region thresholds at the largest crop budget, the best of them at the others.

    Args:
        passes: runs the model.
        coarse: rows after the first pass.
        closed: what they give where their gates stay closed.
        ranked: region thresholds to decode with.
        budgets: crop budgets to try, ascending.
    """
    cost = cost_under(passes.session, {})
    plain_flops = float(sum(cost.plain(row.prompt) for row in coarse))
    gates = [row.gate for row in coarse]
    points: list[Point] = []

    def add(options: dict[str, Any]) -> tuple[float, float]:
        opened = passes.zoomed(coarse, options)
        if gates[0] is None:
            points.append(single_point(opened, options, plain_flops))
        else:
            points.extend(gated_points(closed, opened, np.array(gates), options, plain_flops))
        logger.info("%s: accuracy %.3f when every row zooms", options, opened.right.mean())
        return float(opened.right.mean()), -float(opened.flops.sum())

    tried = [(add({**entry.candidate.options, **budgets[-1]}), entry.candidate) for entry in ranked]
    best = max(tried, key=lambda pair: pair[0])[1]
    for budget in budgets[:-1]:
        add({**best.options, **budget})
    return points
