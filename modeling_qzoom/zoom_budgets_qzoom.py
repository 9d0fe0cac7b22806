"""Crop budgets by need: a region gets the tokens that its own pixels fill, small ones are enlarged.

Areas are in pixels, those of the source and those of the resized crop alike.
"""

import math
from dataclasses import dataclass
from itertools import product

from .backbone_grids_qzoom import Size, TokenGrid
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import InputError
from .zoom_options_qzoom import ZoomOptions


MOST_ENLARGED = 3  # a side; beyond it pixels are only copied
_FLOOR = 64  # tokens
# from so many tokens of the coarse view on, regions are enlarged up to so many tokens (Vision-RL²)
_TARGETS = ((2048, 384), (1024, 256), (0, 160))


@dataclass(frozen=True)
class NeedRule:
    """How large a crop should be for what its region holds.

    Attributes:
        floor: smallest area of a crop, in pixels.
        target: area up to which small regions are enlarged, in pixels.
        cap: largest area, in pixels.
        as_published: size and floor as Vision-RL² has them: Qwen's resize rule finds whole tokens, which rounds up
            where it enlarges, and the floor wins over the cap.
    """

    floor: int
    target: int
    cap: int
    as_published: bool = False

    def area(self, height: int, width: int) -> int:
        """Pixels that the crop of a region of `height` × `width` source pixels should have."""
        native = height * width
        enlarged = min(MOST_ENLARGED**2 * native, self.target)
        return max(min(max(native, enlarged), self.cap), self.floor)

    def size(self, grid: TokenGrid, height: int, width: int) -> Size:
        """(height, width) in pixels that a region of so many source pixels is resized to.

        Raises:
            CropError: no crop can be made of such a region.
        """
        area = self.area(height, width)
        if self.as_published:
            return grid.crop_size(height, width, area, area)
        grid.check_shape(height, width)
        return self._whole_tokens(height, width, grid.token_side, area)

    def _whole_tokens(self, height: int, width: int, side: int, area: int) -> Size:
        """Of the grids just below and just above the wanted size, the one that keeps the bounds best: first the cap,
        then the floor, then the largest enlargement, then the area itself."""
        scale = math.sqrt(area / (height * width)) / side
        rows, columns = height * scale, width * scale
        # a strip of one token is squeezed along its length, so that the cap holds
        if rows < 1:
            rows, columns = 1.0, area / side**2
        elif columns < 1:
            rows, columns = area / side**2, 1.0

        def misfit(size: Size) -> tuple[float, ...]:
            pixels = size[0] * size[1]
            stretched = max(size[0] - MOST_ENLARGED * height, size[1] - MOST_ENLARGED * width, 0)
            return max(pixels - self.cap, 0), max(self.floor - pixels, 0), stretched, abs(pixels - area)

        heights, widths = ([side * math.floor(extent), side * math.ceil(extent)] for extent in (rows, columns))
        return min(product(heights, widths), key=misfit)


def _published_target(max_tokens: int) -> int:
    """Tokens up to which Vision-RL² enlarges regions of a coarse view of at most so many tokens."""
    return next(target for limit, target in _TARGETS if max_tokens >= limit)


def need_rule(config: QZoomConfig, options: ZoomOptions, token_side: int) -> NeedRule:
    """The rule of `crop_budget="need"` or `"visionrl2"`: bounds that are set hold, the others follow from the coarse
    budget.

    Args:
        token_side: side of a merged token in pixels.

    Raises:
        InputError: a bound is left open, and so is the coarse budget.
    """
    low, target, high = options.crop_min_tokens, options.crop_target_tokens, options.crop_max_tokens
    limit, area = config.max_tokens, token_side**2
    if options.crop_budget == "visionrl2":
        if limit is None and (target is None or high is None):
            raise InputError(
                "crop_budget='visionrl2' takes target and cap from max_tokens (model config), which is not set; set "
                "it, or crop_target_tokens and crop_max_tokens."
            )
        target = target or _published_target(limit or 0)
        cap = high * area if high else min(3 * target * area, (limit or 0) * area // 2)
        return NeedRule((low or _FLOOR) * area, target * area, cap, as_published=True)
    cap_tokens = high or max(limit or 0, low or 0)
    if not cap_tokens:
        raise InputError(
            "the crop's budget is unknown: neither crop_max_tokens (call, generation config) nor max_tokens (model "
            "config) is set."
        )
    return NeedRule((low or min(_FLOOR, cap_tokens)) * area, (target or cap_tokens) * area, cap_tokens * area)
