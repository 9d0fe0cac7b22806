"""Options of the fusion stages."""

from dataclasses import dataclass

from ...asking.config import JudgeConfig
from ...data.options import option
from ..common.config import LabelConfig, TrainConfig
from ..common.decoder import DecoderConfig


@dataclass
class MineFusionConfig(LabelConfig):
    """`mine-fusion` (stage 2 data): where the plain model is right and the zoomed one is wrong (paper III-D)."""

    judge: JudgeConfig = option(JudgeConfig(), "who decides whether an answer is right")


@dataclass
class TrainFusionConfig(DecoderConfig, TrainConfig):
    """`train-fusion` (stage 2): the decoder learns to answer from both views as the plain model did."""

    random_box_share: float = option(0.0, "share of samples whose box is replaced by a random one")
    random_box_side: list[float] = option([0.1, 0.6], "range of a random box's sides as shares of the image's")
    keep_share: float | None = option(
        None,
        "share of the coarse tokens that stay above layer K, the hottest first; as the checkpoint says by default",
    )
    anchor_share: float = option(0.0, "share of samples that are rows both ways got right, against forgetting")

    def __post_init__(self) -> None:
        if not 0 <= self.random_box_share <= 1:
            raise ValueError(f"random_box_share must lie in [0, 1], got {self.random_box_share}.")
        if self.keep_share is not None and not 0 <= self.keep_share <= 1:
            raise ValueError(f"keep_share must lie in [0, 1], got {self.keep_share}.")
        if not 0 <= self.anchor_share < 1:
            raise ValueError(f"anchor_share must lie in [0, 1), got {self.anchor_share}.")
        side = self.random_box_side
        if len(side) != 2 or not 0 < side[0] <= side[1] <= 1:
            raise ValueError(f"random_box_side must be two shares [low, high] in (0, 1], got {side}.")
        super().__post_init__()
