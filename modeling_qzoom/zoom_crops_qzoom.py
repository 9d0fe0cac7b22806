"""Crops: a region of the source image, cut out, resized and laid out for the vision tower, on the image's device."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from .backbone_grids_qzoom import PatchGrid, Size, TokenGrid
from .backbones_qzoom import token_grid_of
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import CropError, InputError, UnsupportedError
from .prompt_qzoom import VisualFeatures, encode_images
from .zoom_budgets_qzoom import NeedRule, need_rule
from .zoom_options_qzoom import ZoomOptions
from .zoom_regions_qzoom import Box


@dataclass(frozen=True)
class CropRecipe:
    """How a model wants its crops.

    Attributes:
        grid: the family's token grid.
        min_tokens, max_tokens: budget in merged visual tokens; without effect on a fixed grid.
        mean, std: statistics of the pixel values per channel, in [0, 1] units.
        need: the rule that sizes a crop within the budget; None for its native size, as far as that fits.
    """

    grid: TokenGrid
    min_tokens: int
    max_tokens: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    need: NeedRule | None = None

    def size(self, height: int, width: int) -> Size:
        """(height, width) in pixels that a region of so many source pixels is resized to.

        Raises:
            CropError: no crop can be made of such a region.
        """
        if self.need is not None:
            return self.need.size(self.grid, height, width)
        area = self.grid.token_side**2
        return self.grid.crop_size(height, width, self.min_tokens * area, self.max_tokens * area)

    def tokens(self, height: int, width: int) -> Size:
        """(height, width) in merged tokens of the crop of a region of so many source pixels.

        Raises:
            CropError: no crop can be made of such a region.
        """
        return self.grid.crop_tokens(self.size(height, width))


@dataclass(frozen=True)
class Crop:
    """A region of one image, ready for the vision tower.

    Attributes:
        box: (x0, y0, x1, y1) in source pixels, end exclusive.
        pixel_values: patches (n, 3 · temporal · patch²), or (1, 3, side, side) on a fixed grid; float32.
        patch_grid: (t, h, w) in patches; None on a fixed grid.
        token_grid: (height, width) in merged tokens.
    """

    box: Box
    pixel_values: Tensor
    patch_grid: PatchGrid | None
    token_grid: Size

    @property
    def tokens(self) -> int:
        """Number of merged tokens."""
        return self.token_grid[0] * self.token_grid[1]


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 → (3, *size) float32 whole grey levels, as an image library would store them."""
    resized = pixels[None].float()
    # image libraries store grey levels after the horizontal pass too, which clips overshoots at sharp edges; rounding
    # there as they do would let a tie that falls the other way grow to two levels in the vertical pass
    for step in ((pixels.shape[1], size[1]), size):
        resized = F.interpolate(resized, step, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return (resized[0] + 0.5).floor()  # halves up: upscaling by simple ratios is full of them


def _normalize(pixels: Tensor, recipe: CropRecipe) -> Tensor:
    mean = torch.tensor(recipe.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(recipe.std, device=pixels.device).view(-1, 1, 1)
    return (pixels / 255 - mean) / std


def cut_crop(source: Tensor, box: Box, recipe: CropRecipe) -> Crop:
    """Cuts a region out of its image: the only seam between boxes and network.

    Args:
        source: (3, H, W) uint8, the image in its own resolution.
        box: (x0, y0, x1, y1) in source pixels, end exclusive.

    Raises:
        CropError: the region has no area inside the image, or a shape that no crop can be made of.
    """
    x0, y0, x1, y1 = box
    pixels = source[:, y0:y1, x0:x1]  # (3, h, w)
    height, width = pixels.shape[1:]
    if height < 1 or width < 1:
        raise CropError(f"the region {box} lies outside the image of {source.shape[2]} × {source.shape[1]} pixels.")
    size = recipe.size(height, width)
    pixel_values, patch_grid = recipe.grid.crop_values(_normalize(_resize(pixels, size), recipe))
    return Crop(box, pixel_values, patch_grid, recipe.grid.crop_tokens(size))


def encode_crops(vlm: PreTrainedModel, crops: list[Crop], device: torch.device) -> VisualFeatures:
    """Runs the vision tower once over all crops."""
    pixel_values = torch.cat([crop.pixel_values for crop in crops]).to(device)
    grids = [crop.patch_grid for crop in crops if crop.patch_grid is not None]
    return encode_images(vlm, pixel_values, torch.tensor(grids, device=device) if grids else None)


def crop_recipe(config: QZoomConfig, options: ZoomOptions) -> CropRecipe:
    """How this model's crops are made.

    Raises:
        InputError: the budget is unknown.
        UnsupportedError: a budget is given to a family whose crops have one size.
    """
    grid, need = token_grid_of(config.vlm_config), None
    if not grid.has_budget:
        bounds = (options.crop_min_tokens, options.crop_max_tokens, options.crop_target_tokens)
        if bounds != (None, None, None) or options.crop_budget != "fixed":
            raise UnsupportedError(
                "crop_min_tokens, crop_max_tokens, crop_target_tokens and crop_budget do not apply: crops of this "
                f"backbone always have {math.prod(grid.crop_tokens((1, 1)))} tokens."
            )
        budget = (1, 1)
    elif options.crop_budget != "fixed":
        need = need_rule(config, options, grid.token_side)
        budget = (need.floor // grid.token_side**2, max(need.floor, need.cap) // grid.token_side**2)
    else:
        high = options.crop_max_tokens or config.max_tokens
        low = options.crop_min_tokens or config.min_tokens or 1
        if high is None:
            raise InputError(
                "the crop's budget is unknown: neither crop_max_tokens (call, generation config) nor max_tokens "
                "(model config) is set."
            )
        # one side given in the call moves the other out of its way
        budget = (min(low, high), high) if options.crop_min_tokens is None else (low, max(low, high))
    return CropRecipe(grid, *budget, mean=tuple(config.image_mean), std=tuple(config.image_std), need=need)
