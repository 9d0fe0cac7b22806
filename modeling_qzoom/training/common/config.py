"""Options that several stages share."""

from dataclasses import dataclass, field
from typing import Any

from ...asking.config import ModelConfig
from ...data.config import DataConfig


@dataclass
class LabelConfig(ModelConfig, DataConfig):
    """Stages that run the model over rows and write shards.

    Args:
        output: Folder of the shards; what it holds already is kept and not made again.
        batch_size: Rows per forward pass.
        shard_size: Rows per shard; a stop loses at most the shard at work.
    """

    output: str = ""
    batch_size: int = 8
    shard_size: int = 256


@dataclass
class TrainConfig(ModelConfig):
    """Stages that train.

    Args:
        labels: Folder of the labels, as the labelling stage wrote them.
        output: Folder of the finished checkpoint; Trainer's own checkpoints lie in its `trainer`.
        output_format: "full", or "addon" (branches and adapters only; the only one for a 4-bit backbone).
        other_backbone: Accept labels that were made by another backbone, such as the same one in 16 bit.
        seed: Of drawing, shuffling and initialisation.
        trainer: Arguments of `transformers.TrainingArguments` that win over the stage's defaults.
    """

    labels: str = ""
    output: str = ""
    output_format: str = "full"
    other_backbone: bool = False
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)
