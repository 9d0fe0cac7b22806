"""Samples of stage 1: questions about one image in one sequence, with a map of labels for each question."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...asking.chats import Turn, query_columns, stack_features
from ...asking.metrics import exact_match
from ...asking.session import Session
from ...backbones_qzoom import token_grid_of
from ...data.rows import Row, by_image
from ...training_losses_qzoom import IGNORED
from ..common.branch_dataset import BranchDataset
from ..common.trainer import Counts, Key
from .config import LabelRule
from .record import RegionRecord
from .rule import load_region_targets


logger = logging.getLogger(__name__)


def coarse_grid(grid: tuple[int, int], max_tokens: int | None) -> tuple[int, int]:
    """(h, w) that a map's grid has at a budget, up to rounding: enough to see whether the map holds labels.

    Args:
        grid: (h, w) of the map.
        max_tokens: largest coarse budget; None leaves the grid as it is.
    """
    height, width = grid
    scale = 1.0 if max_tokens is None else min(1.0, math.sqrt(max_tokens / (height * width)))
    return max(1, round(height * scale)), max(1, round(width * scale))


def usable_records(records: Sequence[RegionRecord], rule: LabelRule, max_tokens: int | None) -> list[RegionRecord]:
    """The records whose map has a labelled cell; counts the others.

    Args:
        records: labels of `label-regions`.
        rule: how maps become labels.
        max_tokens: largest coarse budget that is trained on.

    Raises:
        ValueError: none has.
    """
    kept = [
        record
        for record in records
        if bool((load_region_targets(record, coarse_grid(record.grid, max_tokens), rule) != IGNORED).any())
    ]
    logger.info("%d of %d maps hold labels, the others say nothing and are dropped", len(kept), len(records))
    if not kept:
        raise ValueError(
            f"None of the {len(records)} maps holds a label: loosen rule.faintest_peak or rule.largest_box, or look "
            "for other grounding heads."
        )
    return kept


def right_records(records: Sequence[RegionRecord]) -> list[RegionRecord]:
    """The records whose response is the annotated answer.

    Raises:
        ValueError: none is.
    """
    kept = [record for record in records if record.answers and exact_match(record.response, record.answers)]
    logger.info("%d of %d responses are right, the maps of the others are left out", len(kept), len(records))
    if not kept:
        raise ValueError(
            f"None of the {len(records)} responses is the annotated answer; only_right needs rows with answers and a "
            "model that finds some of them."
        )
    return kept


def sequences(records: Sequence[RegionRecord], most: int) -> list[list[RegionRecord]]:
    """Records that share a sequence: about one image, at most `most` of them."""
    groups = by_image(records, lambda record: record.image_id)
    return [group[start : start + most] for group in groups for start in range(0, len(group), most)]


class RegionDataset(BranchDataset):
    """Sequences of questions about one image, with one map a question.

    Args:
        session: model whose processor sets the coarse budget.
        groups: records that share a sequence, from `sequences`.
        rows: rows behind the records, by id.
        rule: how maps become labels.
    """

    def __init__(
        self, session: Session, groups: list[list[RegionRecord]], rows: dict[str, Row], rule: LabelRule
    ) -> None:
        super().__init__(session, rows)
        self.groups, self.rule = groups, rule

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Model inputs of one sequence, (Q, h, w) `targets` and Q `columns` of the asking tokens."""
        group = self.groups[key[1]]
        # the model's own responses stand between the questions, as they did when the maps were taken
        turns: list[Turn] = [(record.question, record.response) for record in group]
        turns[-1] = (turns[-1][0], None)
        features = self.coarse_inputs(self.load_image(group[0].id), turns)
        image_tokens = int((features["input_ids"] == self.vlm_config.image_token_id).sum())
        (grid,) = token_grid_of(self.vlm_config).token_grids(image_tokens, features.get("image_grid_thw"))
        targets = torch.stack([load_region_targets(record, grid, self.rule) for record in group])
        columns = query_columns(self.processor, features["input_ids"][0], turns, self.prompts)
        return {"features": features, "targets": targets, "columns": columns}


def collate_regions(items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """`forward`'s keywords from items of a `RegionDataset`; shorter rows repeat no query but get -1."""
    batch = stack_features([item["features"] for item in items], pad_token_id)
    length = batch["input_ids"].shape[1]
    most = max(len(item["columns"]) for item in items)
    queries = torch.full((len(items), most), -1)
    targets: list[Tensor] = []
    for row, item in enumerate(items):
        offset = length - item["features"]["input_ids"].shape[1]
        count = len(item["columns"])
        queries[row, :count] = torch.tensor(item["columns"]) + offset
        padded = item["targets"].new_full((most, *item["targets"].shape[1:]), IGNORED)
        padded[:count] = item["targets"]
        targets.append(padded)
    return {**batch, "query_positions": queries, "region_targets": targets}


def measure_regions(batch: dict[str, Any]) -> Counts:
    """Share of cells with a label, and of foreground among them."""
    maps = [targets[queries >= 0] for targets, queries in zip(batch["region_targets"], batch["query_positions"])]
    cells = torch.cat([targets.flatten() for targets in maps])
    labelled, foreground = int((cells != IGNORED).sum()), int((cells == 1).sum())
    return {"labelled_cells": (labelled, len(cells)), "foreground_cells": (foreground, labelled)}
