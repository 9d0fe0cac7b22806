"""Options of the gate stages."""

from dataclasses import dataclass

from ...asking.budgets import check_ladder
from ...asking.config import JudgeConfig
from ...data.options import option
from ..common.config import BRANCH_HELP, LabelConfig, TrainConfig, check_branch


LABELINGS = ("consistent", "naive")


@dataclass
class LabelGatesConfig(LabelConfig):
    """`label-gates` (stage 3 data): answers on a ladder of resolutions (paper III-B1)."""

    ladder: list[int] = option([64, 128, 256, 512], "budgets in tokens, ascending")
    judge: JudgeConfig = option(
        JudgeConfig(kind="contains"), "who compares answers with each other and with the annotation"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ladder(self.ladder)


@dataclass
class TrainGateConfig(TrainConfig):
    """`train-gate` (stage 3): the gate learns when the coarse view is enough."""

    labeling: str = option(
        "consistent", "consistent (the paper's rule) or naive (wrong at the coarse budget needs zoom; the ablation)"
    )
    reset: bool = option(True, "start from copies of the backbone's layers")
    easy_share: float = option(1.0, "most easy rows per row with a transition")
    draw_high: float = option(
        0.9, "share of draws of a transition row at one of its two highest wrong rungs; the rest show a right one"
    )
    skip_top: int = option(2, "highest rungs that are never drawn with a label 0")
    branch: str | None = option(None, BRANCH_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labeling not in LABELINGS:
            raise ValueError(f"labeling must be one of {list(LABELINGS)}, got {self.labeling!r}.")
        if not 0 <= self.draw_high <= 1:
            raise ValueError(f"draw_high must lie in [0, 1], got {self.draw_high}.")
        if self.easy_share <= 0:
            raise ValueError(f"easy_share must be positive, got {self.easy_share}.")
        check_branch(self.branch)
