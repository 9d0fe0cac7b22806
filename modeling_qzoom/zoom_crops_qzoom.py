"""Crop, resize and patchify a region of the source image, on whatever device the source lives."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from .backbone_grids_qzoom import token_geometry
from .backbones_qzoom import BackboneSpec
from .configuration_qzoom import QZoomConfig
from .prompt_qzoom import ImageSpan, VisualFeatures, encode_images
from .zoom_options_qzoom import ZoomOptions
from .zoom_regions_qzoom import Box, Rectangle


_MAX_ASPECT_RATIO = 200


class CropError(ValueError):
    """A region that no crop can be made of; the row is then answered from the coarse view."""


@dataclass(frozen=True)
class CropRecipe:
    """How a backbone wants its crops.

    Attributes:
        patch, merge, temporal_patch: patch side in pixels, patches a token side, frames a patch.
        min_tokens, max_tokens: budget in merged visual tokens (native aspect ratio only).
        square: side in pixels of the fixed square crop, None for native aspect ratio.
        mean, std: per channel, in [0, 1] units.
    """

    patch: int
    merge: int
    temporal_patch: int
    min_tokens: int
    max_tokens: int
    square: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def fit_budget(height: int, width: int, recipe: CropRecipe) -> tuple[int, int]:
    """Size in pixels, in whole tokens, nearest to the native one within the budget (the resize rule of Qwen's image
    processors).

    Raises:
        CropError: sides differ by more than a factor of 200.
    """
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise CropError(f"the crop's aspect ratio ({height} × {width} pixels) exceeds {_MAX_ASPECT_RATIO}.")
    side = recipe.patch * recipe.merge
    min_pixels, max_pixels = recipe.min_tokens * side**2, recipe.max_tokens * side**2
    new_height, new_width = round(height / side) * side, round(width / side) * side
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(side, math.floor(height / shrink / side) * side)
        new_width = max(side, math.floor(width / shrink / side) * side)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / side) * side
        new_width = math.ceil(width * grow / side) * side
    return new_height, new_width


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


def _patchify(pixels: Tensor, recipe: CropRecipe) -> Tensor:
    """(3, h, w) → (patches, 3 · temporal · patch²), ordered by token and, within it, by row of patches."""
    patch, merge = recipe.patch, recipe.merge
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    blocks = pixels.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6)  # (token row, token column, row, column in token, 3, patch, patch)
    frames = blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, recipe.temporal_patch, -1, -1)
    return frames.reshape(rows * columns, -1)


def crop_region(source: Tensor, box: Box, recipe: CropRecipe) -> tuple[Tensor, tuple[int, int, int] | None]:
    """Pixel values of one region: the only seam between boxes and network.

    Args:
        source: (3, H, W) uint8, the image in its own resolution.
        box: (x0, y0, x1, y1) in source pixels, end exclusive.

    Returns:
        Native aspect ratio: patches (n, 3 · temporal · patch²) float32 and their grid (t, h, w) in patches.
        Square: pixel values (1, 3, side, side), the region centred and padded with the mean colour, and None.

    Raises:
        CropError: the region has no area or an aspect ratio beyond 200.
    """
    x0, y0, x1, y1 = box
    pixels = source[:, y0:y1, x0:x1]  # (3, h, w)
    height, width = pixels.shape[1:]
    if height < 1 or width < 1:
        raise CropError(f"the region {box} lies outside the image of {source.shape[2]} × {source.shape[1]} pixels.")
    if recipe.square is not None:
        scale = recipe.square / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        normalized = _normalize(_resize(pixels, size), recipe)
        top, left = (recipe.square - size[0]) // 2, (recipe.square - size[1]) // 2
        # after normalisation the mean colour is zero
        canvas = F.pad(normalized, (left, recipe.square - size[1] - left, top, recipe.square - size[0] - top))
        return canvas[None], None
    size = fit_budget(height, width, recipe)
    patches = _patchify(_normalize(_resize(pixels, size), recipe), recipe)
    return patches, (1, size[0] // recipe.patch, size[1] // recipe.patch)


def crop_token_grid(grid: tuple[int, int, int] | None, recipe: CropRecipe) -> tuple[int, int]:
    """(height, width) of a crop in merged tokens."""
    if recipe.square is not None:
        side = recipe.square // (recipe.patch * recipe.merge)
        return side, side
    if grid is None:
        raise ValueError("a crop in its native aspect ratio comes with its grid.")
    return grid[1] // recipe.merge, grid[2] // recipe.merge


@dataclass
class Crop:
    """A region to look at: image `span` of row `row`, box in cells and the crop's pixel values.

    `pixel_values` and `grid` are as `crop_region` returns them, `token_grid` is (height, width) in tokens.
    """

    row: int
    span: ImageSpan
    cells: Rectangle
    pixel_values: Tensor
    grid: tuple[int, int, int] | None
    token_grid: tuple[int, int]


def encode_crops(vlm: PreTrainedModel, crops: list[Crop], device: torch.device) -> VisualFeatures:
    """One pass of the vision tower over all crops."""
    pixel_values = torch.cat([crop.pixel_values for crop in crops]).to(device)
    has_grid = crops[0].grid is not None
    grids = torch.tensor([crop.grid for crop in crops], device=device) if has_grid else None
    return encode_images(vlm, pixel_values, grids)


def crop_recipe(config: QZoomConfig, options: ZoomOptions, spec: BackboneSpec) -> CropRecipe:
    """How this model's crops are made.

    Raises:
        ValueError: the budget is unknown, or given to a family whose crops have one size.
    """
    geometry = token_geometry(config.vlm_config)
    if spec.square_crop:
        if options.crop_min_tokens is not None or options.crop_max_tokens is not None:
            raise ValueError(
                "crop_min_tokens and crop_max_tokens do not apply: crops of this backbone always have "
                f"{geometry.fixed_side**2} tokens."
            )
        budget = (1, 1)
    else:
        high = options.crop_max_tokens or config.max_tokens
        low = options.crop_min_tokens or config.min_tokens or 1
        if high is None:
            raise ValueError(
                "the crop's budget is unknown: neither crop_max_tokens (call, generation config) nor max_tokens "
                "(model config) is set."
            )
        # one side given in the call moves the other out of its way
        budget = (min(low, high), high) if options.crop_min_tokens is None else (low, max(low, high))
    return CropRecipe(
        patch=geometry.patch,
        merge=geometry.merge,
        temporal_patch=geometry.temporal_patch,
        min_tokens=budget[0],
        max_tokens=budget[1],
        square=geometry.image_size if spec.square_crop else None,
        mean=tuple(config.image_mean),
        std=tuple(config.image_std),
    )
