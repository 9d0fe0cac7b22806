"""Samples of stage 3: a row at a resolution drawn for the epoch, and whether that is enough."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from ...asking.budgets import at_budget
from ...asking.chats import stack_features
from ...asking.session import Session
from ...data.rows import Row
from ..common.branch_dataset import BranchDataset
from ..common.trainer import Counts, Key
from .config import TrainGateConfig
from .record import GateRow
from .rule import draw_rung


class GateDataset(BranchDataset):
    """Rows, each at the resolution that is drawn for it in an epoch.

    Args:
        session: model whose processor and backbone make the inputs.
        gate_rows: rows with their labels, from `select_rows`.
        rows: rows behind the labels, by id.
        config: options with the rules of drawing and the seed.
        coarse: index of the rung by which naive labels were made.
    """

    def __init__(
        self, session: Session, gate_rows: list[GateRow], rows: dict[str, Row], config: TrainGateConfig, coarse: int
    ) -> None:
        super().__init__(session, rows)
        self.gate_rows, self.config, self.coarse = gate_rows, config, coarse

    def __len__(self) -> int:
        return len(self.gate_rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Model inputs of one row and its `target`."""
        epoch, index = key
        record = self.gate_rows[index].record
        rng = random.Random(f"rung/{self.config.seed}/{epoch}/{index}")
        rung, target = draw_rung(self.gate_rows[index], len(record.ladder), self.config, rng, self.coarse)
        view, budget = at_budget(self.load_image(record.id), record.ladder[rung], self.vlm_config)
        features = self.coarse_inputs(view, [(record.question, None)], budget)
        return {"features": features, "target": target}


def collate_gates(items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """`forward`'s keywords from items of a `GateDataset`."""
    batch = stack_features([item["features"] for item in items], pad_token_id)
    return {**batch, "gate_targets": torch.tensor([item["target"] for item in items])}


def measure_gates(batch: dict[str, Any]) -> Counts:
    """Share of rows whose view is not enough."""
    targets = batch["gate_targets"]
    return {"needs_zoom": (int((targets == 1).sum()), len(targets))}
