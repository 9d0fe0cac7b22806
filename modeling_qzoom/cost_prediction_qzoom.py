"""What an image and a question will cost, plain and with Q-Zoom, before any weight is loaded."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

from transformers import GenerationConfig

from .backbone_grids_qzoom import Size
from .backbones_qzoom import token_grid_of
from .configuration_qzoom import QZoomConfig
from .cost_qzoom import PrefillCost, Prompt
from .errors_qzoom import InputError, UnsupportedError
from .messages_qzoom import close_miss, shown
from .zoom_crops_qzoom import CropRecipe
from .zoom_options_qzoom import OPTION_NAMES, ZoomOptions, check_order, check_tokens, resolve_options


# text of a prompt in all, and what of it stands in front of the image: in Qwen's chats the system prompt and a marker.
# Zooming runs everything behind the image twice below layer K.
TEXT_TOKENS, PREFIX_TOKENS = 64, 15


@dataclass(frozen=True)
class RowCost:
    """A row before its first new token.

    Attributes:
        visual_tokens: merged visual tokens that the decoder sees, the crop's included.
        tokens: length of the sequence that the answer continues.
        flops: of the whole prefill, vision tower included.
    """

    visual_tokens: int
    tokens: int
    flops: int


@dataclass(frozen=True)
class ZoomCost:
    """Predicted cost of one question about one image.

    Attributes:
        plain: the plain VLM at the same coarse budget, and zoom="never".
        skipped: a row whose gate stays closed.
        zoomed: a row that zooms.
        page_flops, question_flops: reading the image once for many questions (`read_page`), and each question about it
            whose gate stays closed.
        coarse_grid, crop_grid: (height, width) in merged visual tokens.
        options: the options in force.
    """

    plain: RowCost
    skipped: RowCost
    zoomed: RowCost
    page_flops: int
    question_flops: int
    coarse_grid: Size
    crop_grid: Size
    options: ZoomOptions

    @property
    def skip_over_plain(self) -> float:
        """FLOPs of a row that skips, over the plain VLM's."""
        return self.skipped.flops / self.plain.flops

    @property
    def zoom_over_plain(self) -> float:
        """FLOPs of a row that zooms, over the plain VLM's."""
        return self.zoomed.flops / self.plain.flops

    def page_over_plain(self, questions: int) -> float:
        """FLOPs of so many skipping questions about one page, over those of as many plain calls."""
        return (self.page_flops + questions * self.question_flops) / (questions * self.plain.flops)

    def mean_flops(self, zoom_share: float) -> float:
        """Mean FLOPs of rows of which a share in [0, 1] zooms."""
        return (1 - zoom_share) * self.skipped.flops + zoom_share * self.zoomed.flops

    def to_dict(self) -> dict[str, Any]:
        """All of it as Python numbers, lists and dicts."""
        return asdict(self)


def square_grid(tokens: int) -> Size:
    """(height, width) nearest to a square of exactly so many tokens; of the largest below where none is near."""
    side = math.isqrt(tokens)
    for height in range(side, 0, -1):
        if tokens % height == 0 and tokens // height <= 2 * height:
            return height, tokens // height
    return side, tokens // side


def zoom_cost(
    config: QZoomConfig,
    image_size: Size,
    *,
    text_tokens: int = TEXT_TOKENS,
    prefix_tokens: int = PREFIX_TOKENS,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    crop_tokens: int | None = None,
    box: Sequence[int] | None = None,
    generation_configs: Sequence[GenerationConfig] = (),
    **options: Any,
) -> ZoomCost:
    """Predicts tokens and FLOPs of one question about one image; needs no weights.

    Args:
        config: the model's configuration.
        image_size: (height, width) of the image in source pixels.
        text_tokens: tokens of the prompt beside the visual ones, the image's markers included.
        prefix_tokens: how many of them stand in front of the image, its start marker included.
        min_tokens, max_tokens: the coarse budget in merged visual tokens, as the processor takes it; by default the
            configuration's.
        crop_tokens: visual tokens of the crop. By default those of `box`, else the largest that its budget allows.
        box: (x0, y0, x1, y1) of the region in source pixels, end exclusive.
        generation_configs: generation configs in force, whose attributes may carry options.
        options: options of `generate`, such as `gate_branch`; `effort` too. With zoom="always", and without a gate,
            no row pays for one; with zoom="never" all rows are plain ones.

    Raises:
        InputError: a size, budget, box or option out of range or unknown.
        UnsupportedError: a budget for a family whose images always have the same tokens.
    """
    _check_names(options)
    resolved = resolve_options(options, generation_configs, config, mrope=config.backbone.mrope)
    height, width = _checked_size(image_size)
    cost = PrefillCost(config, resolved)
    suffix = _suffix_tokens(cost, text_tokens, prefix_tokens)
    coarse = _coarse_grid(config, height, width, min_tokens, max_tokens)
    crop = _crop_grid(cost, (height, width), crop_tokens, box)
    return _predicted(cost, Prompt(coarse[0] * coarse[1] + text_tokens, suffix, coarse), crop)


def _predicted(cost: PrefillCost, prompt: Prompt, crop: Size) -> ZoomCost:
    """The costs of a prompt under the options of `cost`."""
    options, inserted = cost.options, crop[0] * crop[1]
    gate = cost.config.has_gate and options.zoom == "auto"
    plain = RowCost(prompt.visual, prompt.tokens, cost.plain(prompt))
    skipped, zoomed = plain, plain
    if options.zoom != "never":
        skipped = replace(plain, flops=cost.skipped(prompt, gate=gate))
        tokens = prompt.tokens + inserted + cost.markers
        zoomed = RowCost(prompt.visual + inserted, tokens, cost.zoomed(prompt, crop, gate))
    page, question = cost.page(prompt), cost.question(prompt)
    return ZoomCost(plain, skipped, zoomed, page, question, prompt.grid, crop, options)


def _check_names(options: dict[str, Any]) -> None:
    """Refuses what is no option of `generate`.

    Raises:
        InputError: names the option that was meant.
    """
    known = (*OPTION_NAMES, "effort")
    for name in options:
        if name not in known:
            meant = close_miss(name, known)
            hint = f"did you mean {meant}?" if meant else f"the options are {sorted(known)}."
            raise InputError(f"{name!r} is no option of Q-Zoom; {hint}")


def _is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _suffix_tokens(cost: PrefillCost, text: Any, prefix: Any) -> int:
    """Tokens behind the image and its end marker.

    Raises:
        InputError: no whole numbers, or less text than stands in front of the image and around it.
    """
    for name, value in (("text_tokens", text), ("prefix_tokens", prefix)):
        if not _is_count(value):
            raise InputError(f"{name} must be a positive whole number, got {shown(value)}.")
    suffix = int(text) - int(prefix) - cost.markers // 2
    if suffix < 0:
        raise InputError(f"text_tokens ({text}) counts the {prefix} tokens before the image and its end marker, too.")
    return suffix


def _checked_size(image_size: Any) -> Size:
    """(height, width) of an image in pixels.

    Raises:
        InputError: anything else than two positive whole numbers.
    """
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else ()
    if len(sides) != 2 or not all(map(_is_count, sides)):
        raise InputError(f"image_size must be (height, width) in source pixels, got {shown(image_size)}.")
    return int(sides[0]), int(sides[1])


def _coarse_grid(config: QZoomConfig, height: int, width: int, low: int | None, high: int | None) -> Size:
    """(height, width) of the coarse view of an image of so many pixels, in merged visual tokens."""
    grid = token_grid_of(config.vlm_config)
    if not grid.has_budget:
        if low is not None or high is not None:
            raise UnsupportedError("min_tokens and max_tokens do not apply: images of this backbone have one size.")
        return CropRecipe(grid, 1, 1, (), ()).tokens(height, width)
    for name, value in (("min_tokens", low), ("max_tokens", high)):
        check_tokens(name, value)
    check_order(("min_tokens", "max_tokens"), low, high)
    high = config.max_tokens if high is None else high
    if high is None:
        raise InputError("the coarse budget is unknown: this configuration holds no max_tokens; pass max_tokens.")
    low = min(config.min_tokens or 1, high) if low is None else low
    return CropRecipe(grid, low, max(low, high), (), ()).tokens(height, width)


def _crop_grid(cost: PrefillCost, image: Size, tokens: int | None, box: Any) -> Size:
    """(height, width) of the crop in merged visual tokens.

    Raises:
        InputError: tokens and a box together, tokens outside the budget, or a box outside the image.
    """
    if tokens is not None and box is not None:
        raise InputError("crop_tokens and box both say how large the crop is; pass one of them.")
    if box is not None:
        x0, y0, x1, y1 = _checked_box(box, image)
        return cost.recipe.tokens(y1 - y0, x1 - x0)
    if not token_grid_of(cost.config.vlm_config).has_budget:
        grid = cost.recipe.tokens(*image)
        if tokens is not None and tokens != grid[0] * grid[1]:
            raise UnsupportedError(f"crops of this backbone always have {grid[0] * grid[1]} tokens, not {tokens}.")
        return grid
    if tokens is None:
        return square_grid(cost.recipe.max_tokens)
    check_tokens("crop_tokens", tokens)
    options = cost.options
    check_order(("crop_min_tokens", "crop_tokens"), options.crop_min_tokens, tokens)
    check_order(("crop_tokens", "crop_max_tokens"), tokens, options.crop_max_tokens)
    return square_grid(tokens)


def _checked_box(box: Any, image: Size) -> tuple[int, int, int, int]:
    """A box in pixels.

    Raises:
        InputError: no box of whole pixels with an area inside the image.
    """
    sides = tuple(box) if isinstance(box, (tuple, list)) else ()
    if len(sides) == 4 and all(_is_count(side, 0) for side in sides):
        x0, y0, x1, y1 = (int(side) for side in sides)
        if 0 <= x0 < x1 <= image[1] and 0 <= y0 < y1 <= image[0]:
            return x0, y0, x1, y1
    raise InputError(
        f"box must be (x0, y0, x1, y1) in pixels inside the image of {image[0]} × {image[1]} (height × width), got "
        f"{shown(box)}."
    )


class QZoomCostMixin:
    """`zoom_cost` for a model that holds a `QZoomConfig`."""

    config: QZoomConfig
    generation_config: Any

    def zoom_cost(
        self,
        image_size: Size,
        *,
        text_tokens: int = TEXT_TOKENS,
        prefix_tokens: int = PREFIX_TOKENS,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        crop_tokens: int | None = None,
        box: Sequence[int] | None = None,
        **options: Any,
    ) -> ZoomCost:
        """Predicts tokens and FLOPs of one question about one image, plain, skipped and zoomed.

        No weight is read, so a model on the meta device will do; `zoom_cost(config, …)` needs no model.

        Args:
            image_size: (height, width) of the image in source pixels.
            text_tokens: tokens of the prompt beside the visual ones, the image's markers included.
            prefix_tokens: how many of them stand in front of the image, its start marker included.
            min_tokens, max_tokens: the coarse budget in merged visual tokens, as the processor takes it; by default
                the configuration's.
            crop_tokens: visual tokens of the crop. By default those of `box`, else the largest that its budget allows.
            box: (x0, y0, x1, y1) of the region in source pixels, end exclusive.
            options: options of `generate`; what is left out is taken from `generation_config`, then from the config.

        Raises:
            InputError: a size, budget, box or option out of range or unknown.
            UnsupportedError: a budget for a family whose images always have the same tokens.
        """
        return zoom_cost(
            self.config,
            image_size,
            text_tokens=text_tokens,
            prefix_tokens=prefix_tokens,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            crop_tokens=crop_tokens,
            box=box,
            generation_configs=[entry for entry in (self.generation_config,) if entry is not None],
            **options,
        )
