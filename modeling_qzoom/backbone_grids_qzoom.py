"""Token grids: how pixels, patches and merged visual tokens of an image belong together."""

from dataclasses import dataclass

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig


@dataclass(frozen=True)
class TokenGeometry:
    """Sizes in pixels and patches: a visual token covers `merge` × `merge` patches of `patch` × `patch` pixels."""

    patch: int
    merge: int
    temporal_patch: int
    image_size: int | None

    @property
    def token_side(self) -> int:
        return self.patch * self.merge

    @property
    def fixed_side(self) -> int:
        """Tokens along a side, where the family has one fixed grid.

        Raises:
            ValueError: grids differ from image to image.
        """
        if self.image_size is None:
            raise ValueError(
                "the prompt holds image tokens but image_grid_thw is missing; pass what the processor returned."
            )
        return self.image_size // self.token_side


def token_geometry(vlm_config: PreTrainedConfig) -> TokenGeometry:
    """Reads patch, merge and image size from a VLM's vision configuration."""
    vision = vlm_config.vision_config
    return TokenGeometry(
        patch=vision.patch_size,
        merge=getattr(vision, "spatial_merge_size", 1),
        temporal_patch=getattr(vision, "temporal_patch_size", 1),
        image_size=getattr(vision, "image_size", None),
    )


def image_grids(vlm_config: PreTrainedConfig, image_grid_thw: Tensor | None, num_images: int) -> list[tuple[int, int]]:
    """(height, width) of every image in merged tokens.

    Args:
        image_grid_thw: (num_images, 3), t, h, w in patches, or None where the family has one fixed grid.
    """
    geometry = token_geometry(vlm_config)
    if not num_images:
        return []
    if image_grid_thw is None:
        return [(geometry.fixed_side, geometry.fixed_side)] * num_images
    return [(h // geometry.merge, w // geometry.merge) for _, h, w in image_grid_thw.tolist()]


def count_images(vlm_config: PreTrainedConfig, input_ids: Tensor, image_grid_thw: Tensor | None) -> int:
    """Number of images in a batch of prompts.

    Raises:
        ValueError: image tokens without the grids that the family's processor makes, or (with one fixed grid) a number
            of image tokens that is no multiple of it.
    """
    if image_grid_thw is not None:
        return len(image_grid_thw)
    tokens = int((input_ids == vlm_config.image_token_id).sum())
    geometry = token_geometry(vlm_config)
    if not tokens:
        return 0
    per_image = geometry.fixed_side**2
    if tokens % per_image:
        raise ValueError(f"{tokens} image tokens are not a multiple of the {per_image} that an image of this VLM has.")
    return tokens // per_image
