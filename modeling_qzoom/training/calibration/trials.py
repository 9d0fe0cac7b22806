"""Which ways to zoom are tried on held-out rows, and the points that they give."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import QZoomConfig
from ...asking.session import Session
from ...data.rows import Row
from ...zoom_crops_qzoom import crop_recipe
from ...zoom_options_qzoom import ZoomOptions, validate_options
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


def crop_budgets(config: CalibrateConfig, model: QZoomConfig) -> list[dict[str, Any]]:
    """Crop budgets to try, as options of `generate`; the smallest bound gives way where it is larger.

    Raises:
        ValueError: budgets for a backbone whose crops have one size, or an unknown rule.
    """
    if not model.backbone.grid.has_budget:
        for name in ("crop_max_tokens", "crop_budget"):
            if getattr(config, name):
                raise ValueError(f"{name}: crops of this backbone always have one size; leave it out.")
        return [{}]
    rules = config.crop_budget or [model.crop_budget]
    if rules == [model.crop_budget] == ["fixed"]:
        return _fixed_budgets(config, model)
    budgets = []
    for rule in rules:
        caps: list[int | None] = [None, *config.crop_max_tokens]  # None: the rule's own
        for cap in caps[:1] if rule == "visionrl2" else caps[1:] or caps:
            budgets.append(_whole_budget(model, rule, cap))
    unlike = [budget for place, budget in enumerate(budgets) if budget not in budgets[:place]]
    return sorted(unlike, key=lambda budget: (budget["crop_max_tokens"], budget["crop_budget"] == "fixed"))


def _whole_budget(model: QZoomConfig, rule: str, cap: int | None) -> dict[str, Any]:
    """Every number of a budget, so that none is taken from what another preset leaves in the checkpoint.

    Args:
        model: the model's configuration; the bounds that it sets hold, as they do in a call.
        rule: value of `crop_budget`.
        cap: largest number of tokens; None for what the model sets, or else the rule.

    Raises:
        ValueError: no such rule, or an unknown budget.
    """
    low, high = model.crop_min_tokens, cap or model.crop_max_tokens
    low = low if low is None or high is None else min(low, high)
    options = ZoomOptions(
        crop_budget=rule, crop_min_tokens=low, crop_max_tokens=high, crop_target_tokens=model.crop_target_tokens
    )
    validate_options(options, mrope=model.backbone.mrope)
    recipe = crop_recipe(model, options)
    budget = {"crop_budget": rule, "crop_min_tokens": recipe.min_tokens, "crop_max_tokens": recipe.max_tokens}
    if recipe.need is not None:
        budget["crop_target_tokens"] = recipe.need.target // recipe.grid.token_side**2
    return budget


def _fixed_budgets(config: CalibrateConfig, model: QZoomConfig) -> list[dict[str, Any]]:
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
    passes: Passes, coarse: Sequence[Coarse], closed: Outcomes, ranked: Sequence[Ranked], budgets: list[dict[str, Any]]
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
