"""Random questions about random images, of exact lengths in tokens; answers to them mean nothing."""

from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from ..backbone_grids_qzoom import Size
from ..backbones_qzoom import spec_for_config, token_grid_of
from ..cost_prediction_qzoom import PREFIX_TOKENS, TEXT_TOKENS


# every cell of any heat map belongs to the region, so the box is the whole image and the crop has its budget
WHOLE_IMAGE: dict[str, Any] = {"region_threshold": 0.0, "region_threshold_mode": "absolute"}


def _special_ids(config: PreTrainedConfig) -> set[int]:
    """Ids that text must not hold: images, videos, their markers, padding and ends."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "pad_token_id")
    found: set[int] = set()
    for part in (config, config.get_text_config()):
        for name in (*names, "bos_token_id", "eos_token_id"):
            value = getattr(part, name, None)
            found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return found


def _text(config: PreTrainedConfig, count: int, generator: torch.Generator) -> Tensor:
    """(count,) random ids of ordinary tokens."""
    special = _special_ids(config)
    ordinary = torch.tensor([token for token in range(min(1000, config.get_text_config().vocab_size))])
    ordinary = ordinary[~torch.isin(ordinary, torch.tensor(sorted(special)))]
    return ordinary[torch.randint(len(ordinary), (count,), generator=generator)]


def question_inputs(
    vlm_config: PreTrainedConfig,
    coarse: Size,
    crop: Size,
    *,
    rows: int = 1,
    text_tokens: int = TEXT_TOKENS,
    prefix_tokens: int = PREFIX_TOKENS,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """What a processor would return for questions of one length, each about an image of its own.

    Args:
        vlm_config: the plain VLM's configuration.
        coarse: (height, width) of every image in merged visual tokens.
        crop: the same of its crop, if all of it is cropped to exactly so many tokens.
        rows: number of questions.
        text_tokens, prefix_tokens: as for `zoom_cost`.
        dtype: type of the pixel values.

    Returns:
        Inputs of `generate` on the CPU, `source_images` included, which the plain VLM does not take.
    """
    generator = torch.Generator().manual_seed(0)
    spec, grid = spec_for_config(vlm_config), token_grid_of(vlm_config)
    side, prompts, pixels, patches = grid.token_side, [], [], []
    markers = [getattr(vlm_config, name) for name in (spec.image_start_token, spec.image_end_token) if name]
    for _ in range(rows):
        text = _text(vlm_config, text_tokens - len(markers), generator)
        before = prefix_tokens - len(markers) // 2
        image = torch.full((coarse[0] * coarse[1],), vlm_config.image_token_id)
        if markers:
            image = torch.cat([torch.tensor(markers[:1]), image, torch.tensor(markers[1:])])
        prompts.append(torch.cat([text[:before], image, text[before:]]))
        values, patch_grid = grid.crop_values(torch.randn(3, coarse[0] * side, coarse[1] * side, generator=generator))
        pixels.append(values.to(dtype))
        patches += [] if patch_grid is None else [patch_grid]
    ids = torch.stack(prompts)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat(pixels),
    }
    if patches:
        inputs["image_grid_thw"] = torch.tensor(patches)
        inputs["mm_token_type_ids"] = (ids == vlm_config.image_token_id).int()
    size = (3, 2 * crop[0] * side, 2 * crop[1] * side)
    inputs["source_images"] = [
        torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) for _ in range(rows)
    ]
    return inputs


def crop_options(vlm_config: PreTrainedConfig, crop: Size) -> dict[str, Any]:
    """Options of `generate` under which a crop of `question_inputs` has its size."""
    tokens = crop[0] * crop[1]
    budget = {"crop_min_tokens": tokens, "crop_max_tokens": tokens}
    return {**WHOLE_IMAGE, **(budget if token_grid_of(vlm_config).has_budget else {})}
