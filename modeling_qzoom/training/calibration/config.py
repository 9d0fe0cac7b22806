"""Options of the calibration."""

from dataclasses import dataclass

from ...asking.config import JudgeConfig, ModelConfig
from ...data.config import DataConfig
from ...data.options import check_positive, option


@dataclass
class CalibrateConfig(ModelConfig, DataConfig):
    """`calibrate`: thresholds, budgets and presets from held-out rows."""

    output: str | None = option(None, "folder of the checkpoint with its presets; the model's own folder by default")
    lose_at_most: float = option(0.01, "accuracy that the preset fast may lose against zooming always")
    cost_at_most: float | None = option(
        None,
        "mean prefill FLOPs that the preset fast may cost, as a multiple of the plain model's at the coarse budget",
    )
    crop_max_tokens: list[int] = option([], "crop budgets to try, ascending")
    crop_budget: list[str] = option(
        [], "rules of the crop's budget to try (fixed, need, visionrl2); the model's own by default"
    )
    region_thresholds: dict[str, list[float]] = option(
        {
            "absolute": [0.03, 0.05, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3],
            "peak": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        },
        "region thresholds to try, by mode",
    )
    largest_area: float = option(
        1.0, "mean share of the image that boxes may cover; thresholds that make larger ones are not tried"
    )
    judge: JudgeConfig = option(JudgeConfig(), "who decides whether an answer is right")
    batch_size: int = option(8, "rows per call of generate")
    report: str | None = option(None, "JSON file for every point tried; none by default")

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        if not 0 <= self.lose_at_most < 1:
            raise ValueError(f"lose_at_most must be a share of rows in [0, 1), got {self.lose_at_most}.")
        if not 0 < self.largest_area <= 1:
            raise ValueError(f"largest_area must be a share of the image in (0, 1], got {self.largest_area}.")
