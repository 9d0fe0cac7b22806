"""Options of the fusion stages."""

from dataclasses import dataclass, field
from typing import Any

from ...asking.config import JudgeConfig
from ..common.config import LabelConfig, TrainConfig


@dataclass
class MineFusionConfig(LabelConfig):
    """`mine-fusion` (stage 2 data): where the plain model is right and the zoomed one is wrong (paper III-D).

    Args:
        judge: Who decides.
    """

    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class TrainFusionConfig(TrainConfig):
    """`train-fusion` (stage 2): the decoder learns to answer from both views as the plain model did.

    Args:
        method: "lora" or "full" (decoder layers and output embedding).
        lora: Arguments of `peft.LoraConfig`.
        merge: Merge the adapter into the backbone at the end; by default where `output_format` is "full".
        random_box_share: Share of samples whose box is replaced by a random one.
        random_box_side: Range of a random box's sides as shares of the image's.
        anchor_share: Share of samples that are rows both ways got right, against forgetting.
    """

    method: str = "lora"
    lora: dict[str, Any] = field(default_factory=dict)
    merge: bool | None = None
    random_box_share: float = 0.0
    random_box_side: list[float] = field(default_factory=lambda: [0.1, 0.6])
    anchor_share: float = 0.0
