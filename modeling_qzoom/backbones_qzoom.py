"""The facts in which supported backbones differ: one row each. No other file branches on a backbone's name."""

from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .backbone_grids_qzoom import FixedGrid, NativeGrid, TokenGrid
from .errors_qzoom import UnsupportedError
from .zoom_regions_qzoom import ArtifactRule, no_artifacts, zero_first_token_cells, zero_page_corner


@dataclass(frozen=True)
class BackboneSpec:
    """What Q-Zoom must know of a VLM family.

    Attributes:
        processor_class: name of the family's processor in transformers.
        mrope: positions are (t, h, w) and may be fractional; otherwise plain 1-D positions.
        region_rotary: the region branch rotates its queries and keys.
        region_norm: an extra RMSNorm stands between the region branch's layers and its scorer (SD-RPN on LLaVA).
        artifact_rule: zeroes heat-map cells that fire for every image of the family.
        grid: how images become visual tokens.
        image_start_token, image_end_token: configuration attributes that name the tokens around an image.
        min_box_side: smallest side of a zoom box, in source pixels.
        image_mean, image_std: channel statistics of the family's pixel values, where a checkpoint does not say.
    """

    processor_class: str
    mrope: bool
    region_rotary: bool
    artifact_rule: ArtifactRule
    region_norm: bool = False
    grid: type[TokenGrid] = NativeGrid
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
        grid=FixedGrid,
    ),
}


def spec_for_model_type(model_type: str) -> BackboneSpec:
    """The row of a `model_type`.

    Raises:
        UnsupportedError: no such row; the message lists the known ones and says what a new one needs.
    """
    if model_type not in BACKBONES:
        raise UnsupportedError(
            f"Q-Zoom has no row for model_type {model_type!r}; it knows {sorted(BACKBONES)}. A new one is a "
            "BackboneSpec in backbones_qzoom.py: the family's processor, how positions are made (M-RoPE or plain), "
            "whether the region head rotates queries and keys, the artifact rule of its heat map, and the tokens "
            "around an image."
        )
    return BACKBONES[model_type]


def spec_for_config(vlm_config: PreTrainedConfig) -> BackboneSpec:
    """The row of a VLM's configuration."""
    return spec_for_model_type(vlm_config.model_type)


def token_grid_of(vlm_config: PreTrainedConfig) -> TokenGrid:
    """The token grid of a VLM, with its sizes."""
    return spec_for_config(vlm_config).grid.of(vlm_config)
