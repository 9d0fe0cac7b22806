"""`train-gate`: the gate learns whether the coarse view is enough (stage 3; paper III-B)."""

from collections.abc import Sequence
from typing import Any

from ...asking.session import Session
from ..common.fresh_branches import check_gate, reset_gate
from ..common.labelled import Labelled
from ..common.run import train
from ..common.stage import LabelledStage, Parts
from ..common.trainer import Counts
from .config import TrainGateConfig
from .record import GateRecord
from .rule import check_draws, coarse_rung, select_rows
from .samples import GateDataset, collate_gates, measure_gates


class GateStage(LabelledStage[TrainGateConfig, GateRecord]):
    """Stage 3: the gate on the labels of `label-gates`."""

    name, labels = "train-gate", "label-gates"

    def record(self, row: dict[str, Any]) -> GateRecord:
        return GateRecord.from_row(row)

    def dataset(self, labelled: Labelled[GateRecord]) -> GateDataset:
        session, records = labelled.session, labelled.records
        check_gate(session.model)
        ladder = records[0].ladder if records else []
        check_draws(len(ladder), self.config)
        coarse = coarse_rung(ladder, session.processor.max_tokens)
        rows = select_rows(records, self.config, coarse)
        return GateDataset(session, rows, labelled.rows, self.config, coarse)

    def parts(self, session: Session) -> Parts:
        gate = check_gate(session.model)
        if self.config.branch is not None:
            session.model.config.gate_branch = self.config.branch
        if self.config.reset:
            reset_gate(session.model)
        return [gate]

    def collate(self, items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
        return collate_gates(items, pad_token_id)

    def measure(self, batch: dict[str, Any]) -> Counts:
        return measure_gates(batch)


def run(config: TrainGateConfig) -> None:
    """Train the gate on the labels of `label-gates`, and write the checkpoint to `config.output`.

    Raises:
        ValueError: the model has no gate, or labels, data, output or an option do not fit.
    """
    train(GateStage(config))
