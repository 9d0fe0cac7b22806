"""The stages by name: each is a module with `run(config)`."""

from dataclasses import dataclass

from .stage_configs import (
    CalibrateConfig,
    FindHeadsConfig,
    LabelGatesConfig,
    LabelRegionsConfig,
    MineFusionConfig,
    TrainFusionConfig,
    TrainGateConfig,
    TrainRegionsConfig,
)


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
    "find-heads": Stage(FindHeadsConfig, "find_heads", "which attention heads look at what a question asks about"),
    "label-regions": Stage(
        LabelRegionsConfig, "label_regions", "stage 1 data: where the model looks while it answers"
    ),
    "train-regions": Stage(TrainRegionsConfig, "train_regions", "stage 1, and 2.5 as a re-fit: the region branch"),
    "mine-fusion": Stage(MineFusionConfig, "mine_fusion", "stage 2 data: plain model right, zoomed one wrong"),
    "train-fusion": Stage(TrainFusionConfig, "train_fusion", "stage 2: the decoder answers from both views"),
    "label-gates": Stage(LabelGatesConfig, "label_gates", "stage 3 data: answers on a ladder of resolutions"),
    "train-gate": Stage(TrainGateConfig, "train_gate", "stage 3: the gate"),
    "calibrate": Stage(CalibrateConfig, "calibrate", "thresholds and presets from held-out rows"),
}
