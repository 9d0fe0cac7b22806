"""Options of the fusion stages."""

from dataclasses import dataclass
from typing import Any

from ...asking.config import JudgeConfig
from ...data.options import option
from ..common.config import LabelConfig, TrainConfig


@dataclass
class MineFusionConfig(LabelConfig):
    """`mine-fusion` (stage 2 data): where the plain model is right and the zoomed one is wrong (paper III-D)."""

    judge: JudgeConfig = option(JudgeConfig(), "who decides whether an answer is right")


@dataclass
class TrainFusionConfig(TrainConfig):
    """`train-fusion` (stage 2): the decoder learns to answer from both views as the plain model did."""

    method: str = option("lora", "lora, or full (decoder layers and output embedding)")
    lora: dict[str, Any] = option({}, "arguments of peft.LoraConfig")
    merge: bool | None = option(
        None, "merge the adapter into the backbone at the end; by default where output_format is full"
    )
    random_box_share: float = option(0.0, "share of samples whose box is replaced by a random one")
    random_box_side: list[float] = option([0.1, 0.6], "range of a random box's sides as shares of the image's")
    keep_share: float | None = option(
        None,
        "share of the coarse tokens that stay above layer K, the hottest first; as the checkpoint says by default",
    )
    anchor_share: float = option(0.0, "share of samples that are rows both ways got right, against forgetting")

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise ValueError(f"method must be 'lora' or 'full', got {self.method!r}.")
        if not 0 <= self.random_box_share <= 1:
            raise ValueError(f"random_box_share must lie in [0, 1], got {self.random_box_share}.")
        if self.keep_share is not None and not 0 <= self.keep_share <= 1:
            raise ValueError(f"keep_share must lie in [0, 1], got {self.keep_share}.")
        if not 0 <= self.anchor_share < 1:
            raise ValueError(f"anchor_share must lie in [0, 1), got {self.anchor_share}.")
        side = self.random_box_side
        if len(side) != 2 or not 0 < side[0] <= side[1] <= 1:
            raise ValueError(f"random_box_side must be two shares [low, high] in (0, 1], got {side}.")
        self._check_output()
        super().__post_init__()

    def _check_output(self) -> None:
        """Check that what the method trains can be written as it is to be written.

        Raises:
            ValueError: options that do not go together.
        """
        if self.method == "full":
            if self.load_in_4bit:
                raise ValueError(
                    "method=full cannot train a backbone in 4 bit: set method=lora or load_in_4bit=false."
                )
            if self.output_format == "addon":
                raise ValueError(
                    "method=full changes the backbone, which an add-on does not hold: set output_format=full."
                )
            return
        if self.output_format == "full" and self.merge is False:
            raise ValueError(
                "A full checkpoint has no place for an unmerged adapter: set merge=true, or output_format=addon to "
                "keep the adapter beside its base."
            )
        if self.output_format == "addon" and self.merge:
            raise ValueError(
                "An add-on does not hold the backbone that a merged adapter changes: set output_format=full."
            )

    @property
    def merges(self) -> bool:
        """Whether the adapter is merged in the end: unless told otherwise, where the whole model is written."""
        wish = self.output_format == "full" if self.merge is None else self.merge
        return wish and self.method == "lora"
