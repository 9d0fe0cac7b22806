"""Budgets of visual tokens: the coarse one, the plain one, and ladders of both."""

import math

from PIL import Image
from transformers.configuration_utils import PreTrainedConfig

from .. import QZoomProcessor
from ..backbone_grids_qzoom import FixedGrid
from ..backbones_qzoom import spec_for_model_type, token_grid_of


# smallest and largest number of merged visual tokens of the coarse view
Budget = tuple[int, int]


def at_budget(image: Image.Image, tokens: int, vlm_config: PreTrainedConfig) -> tuple[Image.Image, Budget | None]:
    """The image, and the coarse budget, that show it with the detail of so many merged visual tokens.

    A backbone with one fixed token grid takes no budget. There the picture itself loses detail: it is reduced to the
    pixels that so many tokens would cover, and the processor enlarges it again. A rung at or above the grid's size
    shows it as it is.

    Args:
        image: the picture in RGB.
        tokens: number of merged visual tokens, a rung of the ladder.
        vlm_config: the backbone's configuration.
    """
    grid = token_grid_of(vlm_config)
    if not isinstance(grid, FixedGrid):
        return image, (tokens, tokens)
    share = (tokens / math.prod(grid.token_grid)) ** 0.5
    scale = grid.side * share / min(image.size)
    if share >= 1 or scale >= 1:
        return image, None
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC), None


def check_ladder(ladder: list[int]) -> None:
    """Check the rungs of a ladder of budgets.

    Raises:
        ValueError: it has fewer than two rungs, or does not ascend.
    """
    if len(ladder) < 2 or ladder[0] < 1 or any(low >= high for low, high in zip(ladder, ladder[1:])):
        raise ValueError(f"ladder must hold two or more budgets in tokens, ascending, got {ladder}.")


def coarse_budget(processor: QZoomProcessor) -> Budget | None:
    """The processor's coarse budget, or None for a backbone that has one fixed token grid.

    Bounds that the processor leaves open are those that its image processor is configured with.
    """
    if not spec_for_model_type(processor.backbone_model_type).grid.has_budget:
        return None
    size, side = processor.image_processor.size, processor.image_processor.patch_size
    area = (side * processor.image_processor.merge_size) ** 2
    high = processor.max_tokens or size["longest_edge"] // area
    low = processor.min_tokens or max(1, size["shortest_edge"] // area)
    return min(low, high), high


def plain_budget(tokens: int) -> Budget:
    """The coarse budget of a plain run at `tokens`: at most that many, at least half."""
    return max(1, tokens // 2), tokens
