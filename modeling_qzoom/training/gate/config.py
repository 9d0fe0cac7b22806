"""Options of the gate stages."""

from dataclasses import dataclass, field

from ...asking.config import JudgeConfig
from ..common.config import LabelConfig, TrainConfig


@dataclass
class LabelGatesConfig(LabelConfig):
    """`label-gates` (stage 3 data): answers on a ladder of resolutions (paper III-B1).

    Args:
        ladder: Budgets in tokens, ascending.
        judge: Compares answers with each other and with the annotation.
    """

    ladder: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(kind="contains"))


@dataclass
class TrainGateConfig(TrainConfig):
    """`train-gate` (stage 3).

    Args:
        labeling: "consistent" (the paper's rule) or "naive" (wrong at the coarse budget needs zoom; the ablation).
        reset: Start from copies of the backbone's layers.
        easy_share: Most easy rows per row with a transition.
        draw_high: Share of draws of a transition row at one of its two highest wrong rungs; the rest show a right one.
        skip_top: Highest rungs that are never drawn with a label 0.
    """

    labeling: str = "consistent"
    reset: bool = True
    easy_share: float = 1.0
    draw_high: float = 0.9
    skip_top: int = 2
