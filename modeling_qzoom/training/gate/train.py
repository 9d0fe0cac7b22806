"""`train-gate`: the gate learns whether the coarse view is enough (stage 3; paper III-B)."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ...asking.budgets import at_budget
from ...asking.chats import encode_prompts, render, stack_features
from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session
from ...data.rows import Row
from ..common.fresh_branches import check_gate, reset_gate
from ..common.label_store import labelled_rows, read_labels
from ..common.run import Parts, is_finished, train
from ..common.trainer import Counts, Key
from .config import TrainGateConfig
from .record import GateRow
from .rule import check_draws, coarse_rung, draw_rung, select_rows


STAGE, LABELS = "train-gate", "label-gates"


class GateDataset(Dataset):
    """Rows, each at the resolution that is drawn for it in an epoch.

    Args:
        session: The model, for its processor and its backbone's configuration.
        chosen: From `select_rows`.
        rows: The rows behind the records, by id.
        config: Draw rules and seed.
        coarse: Index of the rung by which naive labels were made.
    """

    def __init__(
        self, session: Session, chosen: list[GateRow], rows: dict[str, Row], config: TrainGateConfig, coarse: int
    ) -> None:
        self.processor, self.vlm_config = session.processor, session.model.config.vlm_config
        self.chosen, self.rows, self.config, self.coarse = chosen, rows, config, coarse

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Model inputs of one row and its `target`."""
        epoch, index = key
        record = self.chosen[index].record
        rng = random.Random(f"rung/{self.config.seed}/{epoch}/{index}")
        rung, target = draw_rung(self.chosen[index], len(record["ladder"]), self.config, rng, self.coarse)
        image = self.rows[record["id"]].load_image(self.processor.max_source_pixels)
        view, budget = at_budget(image, record["ladder"][rung], self.vlm_config)
        text = render(self.processor, [(record["question"], None)], self.config)
        features = encode_prompts(self.processor, [view], [text], **budget)
        for name in ("source_images", "source_boxes"):
            features.pop(name, None)
        return {"features": features, "target": target}


def collate_gates(items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """`forward`'s keywords from items of a `GateDataset`."""
    batch = stack_features([item["features"] for item in items], pad_token_id)
    return {**batch, "gate_targets": torch.tensor([item["target"] for item in items])}


def measure_gates(batch: dict[str, Any]) -> Counts:
    """Share of rows whose view is not enough."""
    targets = batch["gate_targets"]
    return {"needs_zoom": (int((targets == 1).sum()), len(targets))}


def run(config: TrainGateConfig) -> None:
    """Train the gate on the labels of `label-gates`, and write the checkpoint to `config.output`.

    Raises:
        ValueError: The model has no gate, or labels, data, output or an option do not fit.
    """
    if is_finished(config, STAGE):
        return
    rows = labelled_rows(config.labels, LABELS)
    session = open_session(config)
    check_gate(session.model)
    backbone = None if config.other_backbone else backbone_fingerprint(session.model)
    records = list(read_labels(config.labels, LABELS, backbone))
    ladder = records[0]["ladder"] if records else []
    check_draws(len(ladder), config)
    coarse = coarse_rung(ladder, session.processor.max_tokens)
    chosen = select_rows(records, config, coarse)
    pad = session.processor.tokenizer.pad_token_id

    def prepare(opened: Session) -> Parts:
        gate = check_gate(opened.model)
        if config.reset:
            reset_gate(opened.model)
        return [gate]

    train(
        STAGE,
        session,
        config,
        prepare,
        GateDataset(session, chosen, rows, config, coarse),
        lambda items: collate_gates(items, pad),
        measure=measure_gates,
    )
