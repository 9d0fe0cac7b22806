"""`train-fusion` (stage 2): the decoder learns to answer from coarse view and crop as the plain model did (III-D).

Vision tower, embeddings of the prompt, region branch and gate stay as they are.
"""

from typing import Any

from ...asking.session import Session
from ..common.decoder import DecoderTraining, add_lora
from ..common.labelled import Labelled
from ..common.run import train
from ..common.stage import LabelledStage, Parts
from .config import TrainFusionConfig
from .record import FusionRecord
from .samples import FusionSamples, choose_records


class FusionStage(DecoderTraining[TrainFusionConfig], LabelledStage[TrainFusionConfig, FusionRecord]):
    """Stage 2: the decoder on the rows of `mine-fusion`."""

    name, labels = "train-fusion", "mine-fusion"
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 64}

    def record(self, row: dict[str, Any]) -> FusionRecord:
        return FusionRecord.from_row(row)

    def dataset(self, labelled: Labelled[FusionRecord]) -> FusionSamples:
        records = choose_records(labelled.records, self.config.anchor_share, self.config.seed)
        return FusionSamples(labelled.session.processor, records, labelled.rows, self.config)

    def parts(self, session: Session) -> Parts:
        """What the method trains: an adapter, or the decoder's layers and the output embedding."""
        if self.config.keep_share is not None:
            session.model.config.keep_share = self.config.keep_share
        if self.config.method == "lora":
            return add_lora(session.model, self.config)
        return [session.model.get_decoder().layers, session.model.get_output_embeddings()]


def run(config: TrainFusionConfig) -> None:
    """Train on the mined rows and write the checkpoint to `config.output`.

    Raises:
        ValueError: labels, model or options do not fit, or no row got worse by zooming.
        ImportError: peft is missing, or too old for this transformers.
    """
    train(FusionStage(config))
