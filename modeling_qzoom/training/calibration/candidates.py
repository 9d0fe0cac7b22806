"""Which region thresholds are worth decoding with, told from heat maps alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import QZoomConfig, ZoomReport
from ...asking.metrics import area_share, region_recall
from ...backbones_qzoom import token_grid_of
from ...zoom_options_qzoom import ZoomOptions
from ...zoom_regions_qzoom import Box, box_to_pixels, find_region


MOST = 3
_SLACKS = (0.005, 0.02, 0.05)
_ALIKE = 0.2


@dataclass(frozen=True)
class Candidate:
    """A region threshold.

    Attributes:
        mode: "absolute" or "peak".
        threshold: value of the threshold.
    """

    mode: str
    threshold: float

    @property
    def options(self) -> dict[str, Any]:
        """The threshold as options of `generate`."""
        return {"region_threshold": self.threshold, "region_threshold_mode": self.mode}

    def box(self, report: ZoomReport, size: tuple[int, int], config: QZoomConfig, rules: ZoomOptions) -> Box | None:
        """The box that it makes of a heat map, in source pixels.

        Args:
            report: report that holds the heat map.
            size: (width, height) of the image in pixels.
            config: the model's configuration.
            rules: the options in force, for the region rules beside the threshold.
        """
        if report.heatmap is None:
            return None
        cells, _ = find_region(report.heatmap, replace(rules, **self.options))
        if cells is None:
            return None
        grid = (report.heatmap.shape[0], report.heatmap.shape[1])
        min_side, cell_side = config.backbone.min_box_side, token_grid_of(config.vlm_config).token_side
        return box_to_pixels(cells, grid, (size[1], size[0]), min_side, report.grid_box, cell_side)


@dataclass(frozen=True)
class Ranked:
    """A candidate and why it is where it is.

    Attributes:
        candidate: the threshold.
        merit: recall of the rows' own boxes, or agreement with the other candidates where rows have none.
        area: mean share of the image that its boxes cover.
    """

    candidate: Candidate
    merit: float
    area: float


def agreements(boxes: Sequence[Sequence[Box | None]]) -> np.ndarray:
    """(c,) mean intersection over union of each candidate's boxes with those of the others; 0 without a box.

    Args:
        boxes: (rows, c) boxes of each row by each candidate.
    """
    corners = np.array([[box or (0, 0, 0, 0) for box in row] for row in boxes], dtype=float)  # (n, c, 4)
    low = np.maximum(corners[:, :, None, :2], corners[:, None, :, :2])
    high = np.minimum(corners[:, :, None, 2:], corners[:, None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)  # (n, c, c)
    areas = (corners[..., 2:] - corners[..., :2]).prod(-1)
    union = areas[:, :, None] + areas[:, None, :] - shared
    overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0).mean(0)
    others = len(overlap) - 1
    return (overlap.sum(1) - overlap.diagonal()) / max(others, 1)


def rank_candidates(
    candidates: Sequence[Candidate],
    boxes: Sequence[Sequence[Box | None]],
    sizes: Sequence[tuple[int, int]],
    targets: Sequence[Box | None],
    largest_area: float = 1.0,
) -> list[Ranked]:
    """The few candidates that are worth decoding with.

    Where rows know where their answer is, these are the smallest boxes at three losses of recall against the best, as
    only decoding tells how much recall a sharper crop is worth. Elsewhere they are the candidates that agree most with
    all others, without those that make boxes of about the same size.

    Args:
        candidates: (c,) region thresholds.
        boxes: (rows, c) boxes in source pixels.
        sizes: (rows,) of (width, height).
        targets: (rows,) boxes that hold the answer, where known.
        largest_area: candidates whose boxes cover more of the image on average are left out.

    Raises:
        ValueError: all candidates' boxes are larger.
    """
    known_targets = {row: target for row, target in enumerate(targets) if target is not None}
    known = list(known_targets)
    rows = known or range(len(boxes))

    def area(place: int) -> float:
        pairs = ((boxes[row][place], sizes[row]) for row in rows)
        return float(np.mean([0.0 if box is None else area_share(box, size) for box, size in pairs]))

    areas = [area(place) for place in range(len(candidates))]
    if known:
        merits = [
            region_recall([boxes[row][place] for row in known], list(known_targets.values()))
            for place in range(len(candidates))
        ]
    else:
        merits = agreements(boxes).tolist()
    ranked = [Ranked(*parts) for parts in zip(candidates, merits, areas, strict=True)]
    small = [entry for entry in ranked if entry.area <= largest_area]
    if not small:
        raise ValueError(
            f"every region threshold makes boxes of more than largest_area={largest_area}; the smallest cover "
            f"{min(areas):.3f} of the image on average. Try higher region_thresholds or allow more."
        )
    return _smallest_by_recall(small) if known else _unlike(small)


def _smallest_by_recall(ranked: list[Ranked]) -> list[Ranked]:
    best = max(entry.merit for entry in ranked)
    smallest = [
        min((entry for entry in ranked if entry.merit >= best - slack), key=lambda entry: (entry.area, -entry.merit))
        for slack in _SLACKS
    ]
    return list(dict.fromkeys(smallest))[:MOST]


def _unlike(ranked: list[Ranked]) -> list[Ranked]:
    unlike: list[Ranked] = []
    for entry in sorted(ranked, key=lambda entry: -entry.merit):
        if all(abs(entry.area - other.area) > _ALIKE * max(entry.area, other.area) for other in unlike):
            unlike.append(entry)
    return unlike[:MOST] or ranked[:1]
