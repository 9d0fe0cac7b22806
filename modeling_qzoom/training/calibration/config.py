"""Options of the calibration."""

from dataclasses import dataclass, field

from ...asking.config import JudgeConfig, ModelConfig
from ...data.config import DataConfig


@dataclass
class CalibrateConfig(ModelConfig, DataConfig):
    """`calibrate`: thresholds, budgets and presets from held-out rows.

    Args:
        output: Folder of the checkpoint with its presets; the model's own folder by default.
        lose_at_most: Accuracy that "fast" may lose against zooming always.
        cost_at_most: Mean prefill FLOPs that "fast" may cost, as a multiple of the plain model's at the coarse budget.
        crop_max_tokens: Crop budgets to try, ascending.
        region_thresholds: Thresholds to try, by mode.
        largest_area: Mean share of the image that boxes may cover; thresholds that make larger ones are not tried.
        judge: Who decides whether an answer is right.
        batch_size: Rows per call of `generate`.
        report: JSON file for every point tried; none by default.
    """

    output: str | None = None
    lose_at_most: float = 0.01
    cost_at_most: float | None = None
    crop_max_tokens: list[int] = field(default_factory=list)
    region_thresholds: dict[str, list[float]] = field(
        default_factory=lambda: {
            "absolute": [0.03, 0.05, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3],
            "peak": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        }
    )
    largest_area: float = 1.0
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    batch_size: int = 8
    report: str | None = None
