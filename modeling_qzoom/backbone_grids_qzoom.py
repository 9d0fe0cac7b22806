"""Token grids: how an image becomes visual tokens, in its native aspect ratio or on one fixed square."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from .errors_qzoom import CropError, InputError


# (height, width), in tokens or in pixels
Size = tuple[int, int]
# (frames, height, width) of an image in patches, as `image_grid_thw` holds it
PatchGrid = tuple[int, int, int]


@dataclass(frozen=True)
class TokenGrid(ABC):
    """How a family lays an image out as visual tokens.

    A merged visual token covers `merge` × `merge` patches of `patch` × `patch` pixels, `temporal_patch` frames deep.

    Attributes:
        has_budget: whether the number of tokens follows the image's size, between a smallest and a largest one.
        extra_processor_arguments: constructor arguments that the family's processor cannot do without.
    """

    patch: int
    merge: int
    temporal_patch: int

    has_budget: ClassVar[bool]
    extra_processor_arguments: ClassVar[tuple[str, ...]] = ()

    @property
    def token_side(self) -> int:
        """Side of a merged token in pixels."""
        return self.patch * self.merge

    @classmethod
    @abstractmethod
    def of(cls, vlm_config: PreTrainedConfig) -> "TokenGrid":
        """Reads the sizes from a VLM's vision configuration."""

    @abstractmethod
    def token_grids(self, image_tokens: int, image_grid_thw: Tensor | None) -> list[Size]:
        """(height, width) in merged tokens of every image of a batch of prompts.

        Args:
            image_tokens: number of image tokens in the prompts.
            image_grid_thw: (images, 3) grids in patches, where the family's processor makes them.

        Raises:
            InputError: image tokens without the grids, or a number of them that no images make.
        """

    @abstractmethod
    def image_pixels(self, pixel_values: Tensor, image_grid_thw: Tensor | None) -> list[Tensor]:
        """The pixel values of a batch by image; joined along their first dimension they are the batch's again."""

    @abstractmethod
    def check_shape(self, height: int, width: int) -> None:
        """Checks that a crop can be made of a region of `height` × `width` source pixels.

        Raises:
            CropError: it cannot.
        """

    @abstractmethod
    def crop_size(self, height: int, width: int, min_pixels: int, max_pixels: int) -> Size:
        """(height, width) in pixels that a region of `height` × `width` source pixels is resized to.

        Args:
            height, width: sides of the region.
            min_pixels, max_pixels: bounds of the crop's area, where the family has a budget.

        Raises:
            CropError: no crop can be made of such a region.
        """

    @abstractmethod
    def crop_values(self, pixels: Tensor) -> tuple[Tensor, PatchGrid | None]:
        """What the vision tower takes for a crop.

        Args:
            pixels: (3, height, width) normalised pixels of the size that `crop_size` gave.

        Returns:
            The pixel values, and the crop's grid in patches where the family has grids.
        """

    @abstractmethod
    def crop_tokens(self, size: Size) -> Size:
        """(height, width) in merged tokens of a crop of the size that `crop_size` gave."""


@dataclass(frozen=True)
class NativeGrid(TokenGrid):
    """Images keep their aspect ratio; a budget bounds their tokens (Qwen's image processors)."""

    has_budget = True
    # of the resize of Qwen's image processors
    max_aspect_ratio: ClassVar[int] = 200

    @classmethod
    def of(cls, vlm_config: PreTrainedConfig) -> "NativeGrid":
        """Patch, merge and frames of a Qwen vision tower."""
        vision = vlm_config.vision_config
        return cls(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    def token_grids(self, image_tokens: int, image_grid_thw: Tensor | None) -> list[Size]:
        if image_grid_thw is not None:
            return [(h // self.merge, w // self.merge) for _, h, w in image_grid_thw.tolist()]
        if image_tokens:
            raise InputError(
                "the prompt holds image tokens but image_grid_thw is missing; pass what the processor returned."
            )
        return []

    def image_pixels(self, pixel_values: Tensor, image_grid_thw: Tensor | None) -> list[Tensor]:
        assert image_grid_thw is not None  # `token_grids` has refused images without
        return list(pixel_values.split(image_grid_thw.prod(1).tolist()))

    def check_shape(self, height: int, width: int) -> None:
        if max(height, width) > self.max_aspect_ratio * min(height, width):
            raise CropError(f"the crop's aspect ratio ({height} × {width} pixels) exceeds {self.max_aspect_ratio}.")

    def crop_size(self, height: int, width: int, min_pixels: int, max_pixels: int) -> Size:
        """Whole tokens, nearest to the native size within the budget (the resize rule of Qwen's image processors)."""
        self.check_shape(height, width)
        side = self.token_side
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

    def crop_values(self, pixels: Tensor) -> tuple[Tensor, PatchGrid | None]:
        """(patches, 3 · temporal · patch²), ordered by token and, within it, by row of patches; and their grid."""
        patch, merge = self.patch, self.merge
        rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
        blocks = pixels.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        blocks = blocks.permute(
            1, 4, 2, 5, 0, 3, 6
        )  # (token row, token column, row, column in token, 3, patch, patch)
        frames = blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, self.temporal_patch, -1, -1)
        return frames.reshape(rows * columns, -1), (1, rows, columns)

    def crop_tokens(self, size: Size) -> Size:
        return size[0] // self.token_side, size[1] // self.token_side


@dataclass(frozen=True)
class FixedGrid(TokenGrid):
    """Every image fills one square of `side` pixels, cut or padded (CLIP's image processors)."""

    side: int

    has_budget = False
    extra_processor_arguments = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")

    @classmethod
    def of(cls, vlm_config: PreTrainedConfig) -> "FixedGrid":
        """Patch and square of a CLIP vision tower, whose tokens are not merged."""
        vision = vlm_config.vision_config
        return cls(vision.patch_size, 1, 1, vision.image_size)

    @property
    def token_grid(self) -> Size:
        """(height, width) of every image in tokens."""
        return self.side // self.token_side, self.side // self.token_side

    def token_grids(self, image_tokens: int, image_grid_thw: Tensor | None) -> list[Size]:
        height, width = self.token_grid
        if image_tokens % (height * width):
            raise InputError(
                f"{image_tokens} image tokens are not a multiple of the {height * width} that an image of this VLM "
                "has."
            )
        return [(height, width)] * (image_tokens // (height * width))

    def image_pixels(self, pixel_values: Tensor, image_grid_thw: Tensor | None) -> list[Tensor]:
        return list(pixel_values.split(1))

    def check_shape(self, height: int, width: int) -> None:
        """Every shape fits the square."""

    def crop_size(self, height: int, width: int, min_pixels: int, max_pixels: int) -> Size:
        """The longer side fills the square."""
        scale = self.side / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def crop_values(self, pixels: Tensor) -> tuple[Tensor, PatchGrid | None]:
        """(1, 3, side, side): the region centred and padded with the mean colour, which is zero; no grid."""
        height, width = pixels.shape[1:]
        top, left = (self.side - height) // 2, (self.side - width) // 2
        return F.pad(pixels, (left, self.side - width - left, top, self.side - height - top))[None], None

    def crop_tokens(self, size: Size) -> Size:
        return self.token_grid
