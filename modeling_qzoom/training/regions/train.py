"""`train-regions`: the region branch learns where the model looks (stage 1; 2.5 as a re-fit; paper III-C)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...asking.chats import encode_prompts, query_columns, render, stack_features
from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session
from ...backbones_qzoom import token_grid_of
from ...data.rows import Row
from ...training_losses_qzoom import IGNORED
from ..common.fresh_branches import reset_region
from ..common.label_store import labelled_rows, read_labels
from ..common.run import Parts, is_finished, train
from ..common.trainer import Counts, Key
from .config import TrainRegionsConfig, TriStateConfig
from .record import Record, right_records, sequences, usable_records
from .rule import load_region_targets


logger = logging.getLogger(__name__)


STAGE, LABELS = "train-regions", "label-regions"


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
        image_tokens = int((features["input_ids"] == self.vlm_config.image_token_id).sum())
        (grid,) = token_grid_of(self.vlm_config).token_grids(image_tokens, features.get("image_grid_thw"))
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
