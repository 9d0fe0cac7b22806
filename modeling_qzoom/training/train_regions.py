"""`train-regions`: the region branch learns where the model looks (stage 1; 2.5 as a re-fit; paper III-C)."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..backbones_qzoom import image_grids
from ..evaluation.metrics import exact_match
from ..supervision_qzoom import IGNORED
from .data import Row, by_image
from .fresh_branches import reset_region
from .label_rows import labelled_rows
from .prompts import encode_prompts, query_columns, render, stack_features
from .region_labels import load_region_targets
from .runs import Parts, is_finished, train
from .session import Session, backbone_fingerprint, open_session
from .shards import read_labels
from .stage_configs import TrainRegionsConfig, TriStateConfig
from .trainer import Counts, Key


logger = logging.getLogger(__name__)

STAGE, LABELS = "train-regions", "label-regions"
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


class RegionDataset(Dataset):
    """Sequences of questions about one image, with one map a question.

    Args:
        session: Its processor sets the coarse budget.
        groups: From `sequences`.
        rows: The rows behind the records, by id.
        rule: Thresholds.
    """

    def __init__(
        self, session: Session, groups: list[list[Record]], rows: dict[str, Row], rule: TriStateConfig
    ) -> None:
        self.processor, self.config = session.processor, session.config
        self.vlm_config = session.model.config.vlm_config
        self.groups, self.rows, self.rule = groups, rows, rule

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Model inputs of one sequence, (Q, h, w) `targets` and Q `columns` of the asking tokens."""
        group = self.groups[key[1]]
        image = self.rows[group[0]["id"]].load_image(self.processor.max_source_pixels)
        # the model's own responses stand between the questions, as they did when the maps were taken
        turns: list[tuple[str, str | None]] = [(record["question"], record["response"]) for record in group]
        turns[-1] = (turns[-1][0], None)
        features = encode_prompts(self.processor, [image], [render(self.processor, turns, self.config)])
        for name in ("source_images", "source_boxes"):
            features.pop(name, None)
        grid = image_grids(self.vlm_config, features.get("image_grid_thw"), 1)[0]
        targets = torch.stack([load_region_targets(record, grid, self.rule) for record in group])
        columns = query_columns(self.processor, features["input_ids"][0], turns, self.config)
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
    asked = [targets[queries >= 0] for targets, queries in zip(batch["region_targets"], batch["query_positions"])]
    cells = torch.cat([targets.flatten() for targets in asked])
    labelled, foreground = int((cells != IGNORED).sum()), int((cells == 1).sum())
    return {"labelled_cells": (labelled, len(cells)), "foreground_cells": (foreground, labelled)}


def run(config: TrainRegionsConfig) -> None:
    """Train the region branch on the labels of `label-regions`, and write the checkpoint to `config.output`.

    Raises:
        ValueError: Labels, data, output or an option do not fit.
    """
    if config.questions_per_image < 1:
        raise ValueError(f"questions_per_image must be at least 1, got {config.questions_per_image}.")
    if is_finished(config, STAGE):
        return
    rows = labelled_rows(config.labels, LABELS)
    session = open_session(config)
    backbone = None if config.other_backbone else backbone_fingerprint(session.model)
    records = list(read_labels(config.labels, LABELS, backbone))
    if config.only_right:
        records = right_records(records)
    records = usable_records(records, config.rule, session.processor.max_tokens)
    groups = sequences(records, config.questions_per_image)
    logger.info("%d questions in %d sequences", len(records), len(groups))
    pad = session.processor.tokenizer.pad_token_id

    def prepare(opened: Session) -> Parts:
        if config.reset:
            reset_region(opened.model)
        return [opened.model.zoom.region]

    train(
        STAGE,
        session,
        config,
        prepare,
        RegionDataset(session, groups, rows, config.rule),
        lambda items: collate_regions(items, pad),
        measure=measure_regions,
    )
