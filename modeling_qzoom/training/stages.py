"""The stages by name: each is a module with `run(config)`."""

from dataclasses import dataclass

from .calibration.config import CalibrateConfig
from .fusion.config import MineFusionConfig, TrainFusionConfig
from .gate.config import LabelGatesConfig, TrainGateConfig
from .regions.config import FindHeadsConfig, LabelRegionsConfig, TrainRegionsConfig


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        config: Dataclass of its options.
        module: Module of this package whose `run` carries it out; imported only when it is used.
        summary: One line for the command's help.
    """

    config: type
    module: str
    summary: str


STAGES: dict[str, Stage] = {
    "find-heads": Stage(
        FindHeadsConfig, "regions.find_heads", "which attention heads look at what a question asks about"
    ),
    "label-regions": Stage(
        LabelRegionsConfig, "regions.label", "stage 1 data: where the model looks while it answers"
    ),
    "train-regions": Stage(TrainRegionsConfig, "regions.train", "stage 1, and 2.5 as a re-fit: the region branch"),
    "mine-fusion": Stage(MineFusionConfig, "fusion.mine", "stage 2 data: plain model right, zoomed one wrong"),
    "train-fusion": Stage(TrainFusionConfig, "fusion.train", "stage 2: the decoder answers from both views"),
    "label-gates": Stage(LabelGatesConfig, "gate.label", "stage 3 data: answers on a ladder of resolutions"),
    "train-gate": Stage(TrainGateConfig, "gate.train", "stage 3: the gate"),
    "calibrate": Stage(CalibrateConfig, "calibration.calibrate", "thresholds and presets from held-out rows"),
}
