"""The facts in which supported backbones differ: one row each. No other file branches on a backbone's name."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .regions_qzoom import ArtifactRule, no_artifacts, zero_first_token_cells, zero_page_corner


@dataclass(frozen=True)
class BackboneSpec:
    """What Q-Zoom must know of a VLM family.

    Attributes:
        processor_class: name of the family's processor in transformers.
        mrope: positions are (t, h, w) and may be fractional; otherwise plain 1-D positions.
        region_rotary: the region branch rotates its queries and keys.
        region_norm: an extra RMSNorm stands between the region branch's layers and its scorer (SD-RPN on LLaVA).
        artifact_rule: zeroes heat-map cells that fire for every image of the family.
        square_crop: crops have one fixed square size (padded), instead of their native aspect ratio.
        image_start_token, image_end_token: configuration attributes that name the tokens around an image.
        min_box_side: smallest side of a zoom box, in source pixels.
        image_mean, image_std: channel statistics of the family's pixel values, where a checkpoint does not say.
    """

    processor_class: str
    mrope: bool
    region_rotary: bool
    artifact_rule: ArtifactRule
    region_norm: bool = False
    square_crop: bool = False
    image_start_token: str | None = None
    image_end_token: str | None = None
    min_box_side: int = 28
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


_QWEN_MARKERS: dict[str, Any] = {
    "image_start_token": "vision_start_token_id",
    "image_end_token": "vision_end_token_id",
}

BACKBONES: dict[str, BackboneSpec] = {
    "qwen2_5_vl": BackboneSpec(
        processor_class="Qwen2_5_VLProcessor",
        mrope=True,
        region_rotary=True,
        artifact_rule=zero_page_corner,
        **_QWEN_MARKERS,
    ),
    "qwen3_vl": BackboneSpec(
        processor_class="Qwen3VLProcessor",
        mrope=True,
        region_rotary=True,
        artifact_rule=zero_first_token_cells,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        **_QWEN_MARKERS,
    ),
    "llava": BackboneSpec(
        processor_class="LlavaProcessor",
        mrope=False,
        region_rotary=False,
        artifact_rule=no_artifacts,
        region_norm=True,
        square_crop=True,
    ),
}


def spec_for_model_type(model_type: str) -> BackboneSpec:
    """The row of a `model_type`.

    Raises:
        ValueError: no such row; the message lists the known ones and says what a new one needs.
    """
    if model_type not in BACKBONES:
        raise ValueError(
            f"Q-Zoom has no row for model_type {model_type!r}; it knows {sorted(BACKBONES)}. A new one is a "
            "BackboneSpec in backbones_qzoom.py: the family's processor, how positions are made (M-RoPE or plain), "
            "whether the region head rotates queries and keys, the artifact rule of its heat map, and the tokens "
            "around an image."
        )
    return BACKBONES[model_type]


def spec_for_config(vlm_config: PreTrainedConfig) -> BackboneSpec:
    """The row of a VLM's configuration."""
    return spec_for_model_type(vlm_config.model_type)


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


@dataclass
class VisualFeatures:
    """Encoded images: `embeds[i]` (n_i, D) and, per DeepStack level, `deepstack[level][i]` (n_i, D)."""

    embeds: list[Tensor]
    deepstack: list[list[Tensor]]


def as_visual_features(encoded: Any) -> VisualFeatures:
    """Normalises what a VLM's `get_image_features` (or `get_video_features`) returned."""
    deepstack = getattr(encoded, "deepstack_features", None) or []
    return VisualFeatures(list(encoded.pooler_output), [list(level) for level in deepstack])


def encode_images(vlm: PreTrainedModel, pixel_values: Tensor, image_grid_thw: Tensor | None) -> VisualFeatures:
    """Runs the vision tower and projector."""
    grid = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw}
    return as_visual_features(vlm.get_image_features(pixel_values, return_dict=True, **grid))


def mismatch(kind: str, tokens: int, features: int) -> str:
    """The plain VLMs' sentence about prompts and images that do not belong together; `kind` is Image or Video."""
    return f"{kind} features and {kind.lower()} tokens do not match, tokens: {tokens}, features: {features}"


def check_visual_tokens(vlm_config: PreTrainedConfig, input_ids: Tensor, vision: dict[str, Any]) -> None:
    """Compares image and video tokens of prompts with the grids beside them, as far as both are there.

    Raises:
        ValueError: there are more or fewer tokens than the grids have cells.
    """
    for kind in ("Image", "Video"):
        grids = vision.get(f"{kind.lower()}_grid_thw")
        if grids is None:
            continue
        tokens = int(torch.eq(input_ids, getattr(vlm_config, f"{kind.lower()}_token_id")).sum())
        if not tokens:  # of pixel values without a place the VLM itself complains
            continue
        features = int(grids.prod(-1).sum()) // token_geometry(vlm_config).merge ** 2
        if tokens != features:
            raise ValueError(mismatch(kind, tokens, features))


# what positions depend on besides ids and padding
POSITION_INPUTS = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def prompt_positions(
    vlm: PreTrainedModel, spec: BackboneSpec, input_ids: Tensor, attention_mask: Tensor, **vision: Any
) -> Tensor:
    """Positions of a prompt as the plain VLM makes them, without its side effect on the module.

    Args:
        input_ids, attention_mask: (B, N).
        vision: the `POSITION_INPUTS` that are present.

    Returns:
        (4, B, N) long for M-RoPE (text position, t, h, w), (B, N) long otherwise; pads hold 0.
    """
    text = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)  # (B, N)
    if not spec.mrope:
        return text
    has_grid = vision.get("image_grid_thw") is not None or vision.get("video_grid_thw") is not None
    if not has_grid:
        return text[None].expand(4, -1, -1)
    if vision.get("mm_token_type_ids") is None:
        types = (input_ids == vlm.config.image_token_id).int() + 2 * (input_ids == vlm.config.video_token_id).int()
        vision = {**vision, "mm_token_type_ids": types}
    check_visual_tokens(vlm.config, input_ids, vision)
    vlm = vlm.get_base_model() if hasattr(vlm, "get_base_model") else vlm  # a VLM in a wrapper of peft
    try:
        grid, _ = vlm.base_model.get_rope_index(input_ids, attention_mask=attention_mask, **vision)
    except StopIteration as error:  # which would silently end a loop over batches
        raise ValueError(
            "the prompts hold more separate stretches of image or video tokens than there are grids in image_grid_thw "
            "or video_grid_thw. Were prompts and images processed together?"
        ) from error
    return torch.cat([text[None], grid.to(text)], dim=0)
