"""Options that several stages share."""

from dataclasses import dataclass
from typing import Any

from ...asking.config import ModelConfig
from ...asking.session import check_output_format
from ...data.config import DataConfig
from ...data.options import check_positive, option
from ...zoom_options_qzoom import BRANCHES


BRANCH_HELP = (
    "full or light: whether the branch's layers update visual tokens or only read them as they are after layer K; as "
    "the checkpoint says by default"
)


def check_branch(branch: str | None) -> None:
    """Check how a branch is to run.

    Raises:
        ValueError: there is no such way.
    """
    if branch is not None and branch not in BRANCHES:
        raise ValueError(f"branch must be one of {list(BRANCHES)}, got {branch!r}.")


@dataclass
class LabelConfig(ModelConfig, DataConfig):
    """Labels that are made by running the model over rows."""

    output: str = option("", "folder of the labels; what it holds already is kept and not made again")
    batch_size: int = option(8, "rows per forward pass")
    shard_size: int = option(256, "rows per file of labels; a stop loses at most the file at work")

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "shard_size")


@dataclass
class RunConfig(ModelConfig):
    """A training run."""

    output: str = option("", "folder of the finished checkpoint; Trainer's own checkpoints lie in its folder trainer")
    output_format: str = option(
        "full", "full, or addon (branches and adapters only; the only one for a 4-bit backbone)"
    )
    seed: int = option(0, "seed of drawing, shuffling and initialisation")
    trainer: dict[str, Any] = option({}, "arguments of transformers.TrainingArguments that win over the stage's own")

    def __post_init__(self) -> None:
        check_output_format(self.output_format)
        if self.load_in_4bit and self.output_format != "addon":
            raise ValueError("A 4-bit backbone is not written out: set output_format=addon.")


@dataclass
class TrainConfig(RunConfig):
    """Training on labels."""

    labels: str = option("", "folder of the labels, as the labelling stage wrote them")
    other_backbone: bool = option(
        False, "accept labels that were made by another backbone, such as the same one in 16 bit"
    )
