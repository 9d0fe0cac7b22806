"""`train-vision`: the decoder learns to answer under configurations of VISOR, the plain model among them by default.

With one configuration it is the paper's second step, with several its universal model. Vision tower, embeddings and
branches stay as they are; the branches were trained on other states of layer K, so fit them again (train-regions,
train-gate) where rows are to be zoomed.
"""

from typing import Any

from ...asking.session import Session
from ..common.answered import Answered
from ..common.decoder import DecoderTraining, add_lora
from ..common.run import train
from ..common.stage import Parts, TrainStage
from .config import TrainVisionConfig
from .configurations import add_configurations, chosen_configurations, configuration_at
from .samples import AnswerSamples


class VisionStage(DecoderTraining[TrainVisionConfig], TrainStage[TrainVisionConfig, Answered]):
    """The decoder on rows with answers, under a configuration that changes from step to step."""

    name = "train-vision"
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 16}  # the paper's 128 rows a step

    def open(self) -> Answered:
        return Answered.open(self.config)

    def dataset(self, material: Answered) -> AnswerSamples:
        return AnswerSamples(material.session, material.rows)

    def parts(self, session: Session) -> Parts:
        """What the method trains: an adapter, or the decoder's layers and its norm."""
        add_configurations(session.model.config, self.config.add_configurations)
        chosen_configurations(session.model.config, self.config.configurations)
        if self.config.method == "lora":
            return add_lora(session.model, self.config)
        return [session.model.get_decoder().layers, session.model.get_decoder().norm]

    def at_step(self, session: Session, step: int) -> dict[str, Any]:
        names = chosen_configurations(session.model.config, self.config.configurations)
        return {"vision": configuration_at(names, self.config.seed, step)}


def run(config: TrainVisionConfig) -> None:
    """Train on rows with answers and write the checkpoint to `config.output`.

    Raises:
        ValueError: data, model, configurations or options do not fit.
        ImportError: peft is missing, or too old for this transformers.
    """
    train(VisionStage(config))
