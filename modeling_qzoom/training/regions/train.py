"""`train-regions`: the region branch learns where the model looks (stage 1; 2.5 as a re-fit; paper III-C)."""

import logging
from collections.abc import Sequence
from typing import Any

from ...asking.session import Session
from ..common.fresh_branches import reset_region
from ..common.labelled import Labelled
from ..common.run import train
from ..common.stage import LabelledStage, Parts
from ..common.trainer import Counts
from .config import TrainRegionsConfig
from .record import RegionRecord
from .samples import RegionDataset, collate_regions, measure_regions, right_records, sequences, usable_records


logger = logging.getLogger(__name__)


class RegionStage(LabelledStage[TrainRegionsConfig, RegionRecord]):
    """Stage 1: the region branch on the labels of `label-regions`."""

    name, labels = "train-regions", "label-regions"

    def record(self, row: dict[str, Any]) -> RegionRecord:
        return RegionRecord.from_row(row)

    def dataset(self, labelled: Labelled[RegionRecord]) -> RegionDataset:
        session, records = labelled.session, labelled.records
        if self.config.only_right:
            records = right_records(records)
        records = usable_records(records, self.config.rule, session.processor.max_tokens)
        groups = sequences(records, self.config.questions_per_image)
        logger.info("%d questions in %d sequences", len(records), len(groups))
        return RegionDataset(session, groups, labelled.rows, self.config.rule)

    def parts(self, session: Session) -> Parts:
        if self.config.branch is not None:
            session.model.config.region_branch = self.config.branch
        if self.config.reset:
            reset_region(session.model)
        return [session.model.zoom.region]

    def collate(self, items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
        return collate_regions(items, pad_token_id)

    def measure(self, batch: dict[str, Any]) -> Counts:
        return measure_regions(batch)


def run(config: TrainRegionsConfig) -> None:
    """Train the region branch on the labels of `label-regions`, and write the checkpoint to `config.output`.

    Raises:
        ValueError: labels, data, output or an option do not fit.
    """
    train(RegionStage(config))
