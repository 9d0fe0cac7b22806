"""Options of VISOR's stages: the decoder under its configurations, and the router among them."""

from dataclasses import dataclass

from ...asking.config import JudgeConfig
from ...data.options import option
from ..common.answered import AnsweredConfig
from ..common.config import LabelConfig, TrainConfig
from ..common.decoder import DecoderConfig


WRONG = ("drop", "cheapest")


@dataclass
class TrainVisionConfig(DecoderConfig, AnsweredConfig):
    """`train-vision`: the decoder learns to answer under configurations of VISOR, one drawn for every step."""

    add_configurations: dict[str, str] = option(
        {},
        "configurations to write into the checkpoint first: a name each, and one letter a decoder layer (S: "
        "self-attention, R: reading, T: text only)",
    )
    configurations: list[str] | None = option(
        None, "names of the configurations to draw from; by default dense and all of the checkpoint's"
    )

    def __post_init__(self) -> None:
        names = self.configurations
        if names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(f"configurations must be one or more different names, got {names}.")
        super().__post_init__()


@dataclass
class LabelRoutesConfig(LabelConfig):
    """`label-routes` (the router's data): which configurations of VISOR answer a row rightly."""

    configurations: list[str] | None = option(
        None, "names of the configurations to ask; by default dense and all of the checkpoint's"
    )
    judge: JudgeConfig = option(JudgeConfig(), "who decides whether an answer is right")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names("configurations", self.configurations)


@dataclass
class TrainRouterConfig(TrainConfig):
    """`train-router`: the router learns the cheapest configuration that answers as rightly as the largest one."""

    choices: list[str] | None = option(
        None,
        "configurations to choose from; by default those of the checkpoint's router, or dense and all of its "
        "configurations where it has none",
    )
    layer: int | None = option(
        None,
        "decoder layer that the router stands in front of; by default where the checkpoint's router does, or the "
        "first layer in which the choices differ",
    )
    reset: bool = option(True, "start from a fresh router")
    wrong: str = option(
        "drop",
        "what a row teaches that the largest configuration gets wrong: drop (nothing), or cheapest (nothing helps)",
    )

    def __post_init__(self) -> None:
        if self.wrong not in WRONG:
            raise ValueError(f"wrong must be one of {list(WRONG)}, got {self.wrong!r}.")
        _check_names("choices", self.choices)
        super().__post_init__()


def _check_names(option_name: str, names: list[str] | None) -> None:
    if names is not None and (len(names) < 2 or len(set(names)) < len(names)):
        raise ValueError(f"{option_name} must be two or more different names, got {names}.")
