"""Records of region labels."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from ...asking.metrics import exact_match
from ...data.rows import by_image
from ...training_losses_qzoom import IGNORED
from .config import TriStateConfig
from .rule import load_region_targets


logger = logging.getLogger(__name__)


Record = dict[str, Any]


def coarse_grid(record: Record, max_tokens: int | None) -> tuple[int, int]:
    """(h, w) that a record's map has at a budget, up to rounding: enough to see whether it holds labels."""
    height, width = record["height"], record["width"]
    scale = 1.0 if max_tokens is None else min(1.0, math.sqrt(max_tokens / (height * width)))
    return max(1, round(height * scale)), max(1, round(width * scale))


def usable_records(records: Sequence[Record], rule: TriStateConfig, max_tokens: int | None) -> list[Record]:
    """The records whose map has a labelled cell; counts the others.

    Raises:
        ValueError: None has.
    """
    kept = [
        record
        for record in records
        if bool((load_region_targets(record, coarse_grid(record, max_tokens), rule) != IGNORED).any())
    ]
    logger.info("%d of %d maps hold labels, the others say nothing and are dropped", len(kept), len(records))
    if not kept:
        raise ValueError(
            f"None of the {len(records)} maps holds a label: loosen rule.faintest_peak or rule.largest_box, or look "
            "for other grounding heads."
        )
    return kept


def right_records(records: Sequence[Record]) -> list[Record]:
    """The records whose response is the annotated answer.

    Raises:
        ValueError: None is.
    """
    kept = [record for record in records if record["answers"] and exact_match(record["response"], record["answers"])]
    logger.info("%d of %d responses are right, the maps of the others are left out", len(kept), len(records))
    if not kept:
        raise ValueError(
            f"None of the {len(records)} responses is the annotated answer; only_right needs rows with answers and a "
            "model that finds some of them."
        )
    return kept


def sequences(records: Sequence[Record], most: int) -> list[list[Record]]:
    """Records that share a sequence: about one image, at most `most` of them."""
    groups = by_image(records, lambda record: record["image_id"])
    return [group[start : start + most] for group in groups for start in range(0, len(group), most)]
