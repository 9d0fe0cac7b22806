"""The coarse pass: the whole prompt through decoder layers [0, K), for `generate`, `forward` and label making."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_layers_qzoom import Mask, causal_mask, rotary, run_layers
from .backbone_plans_qzoom import LayerPlan
from .backbone_projections_qzoom import Rotary
from .prompt_checks_qzoom import check_ids, check_prompt
from .prompt_qzoom import (
    POSITION_INPUTS,
    DeepStack,
    VisualFeatures,
    as_visual_features,
    embed_prompt,
    encode_images,
    prompt_positions,
)
from .rows_qzoom import Positions
from .zoom_model_qzoom import ZoomModel


@dataclass(frozen=True)
class CoarseView:
    """A batch of prompts on its way through the lower decoder layers.

    Attributes:
        input_ids, valid: (B, N); `valid` is 0 on padding and on tokens that a prompt's own mask hides.
        positions: positions of all tokens.
        position_embeddings: cos and sin, each (B, N, head_dim).
        mask: the causal mask of the pass.
        embeds: (B, N, D) inputs of layer 0.
        deepstack: features that the first layers add to the embeddings.
        hidden: (B, N, D) inputs of layer K; of layer 0 before the pass.
        cache: receives keys and values of the layers that run; None in training passes.
    """

    input_ids: Tensor
    valid: Tensor
    positions: Positions
    position_embeddings: Rotary
    mask: Mask
    embeds: Tensor
    deepstack: DeepStack | None
    hidden: Tensor
    cache: DynamicCache | None = None


def lay_out(
    model: ZoomModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    encoded: dict[str, VisualFeatures],
    positions: Positions,
    cache: DynamicCache | None = None,
) -> CoarseView:
    """A batch of prompts in front of layer 0.

    Args:
        input_ids, attention_mask: (B, N); no mask where nothing is hidden.
        encoded: features of the prompts' images and videos by kind, "image" and "video".
        cache: empty; the layers fill it.
    """
    decoder = model.vlm.get_decoder()
    embeds, deepstack = embed_prompt(model.vlm, input_ids, encoded.get("image"), encoded.get("video"))
    return CoarseView(
        input_ids,
        valid=torch.ones_like(input_ids) if attention_mask is None else attention_mask.long(),
        positions=positions,
        position_embeddings=rotary(decoder, embeds, positions.for_decoder()),
        mask=causal_mask(decoder, embeds, attention_mask, cache),
        embeds=embeds,
        deepstack=deepstack,
        hidden=embeds,
        cache=cache,
    )


def coarse_view(
    model: ZoomModel, input_ids: Tensor, attention_mask: Tensor | None, vision: dict[str, Any]
) -> CoarseView:
    """A batch of prompts in front of layer 0, from the arguments of `forward`.

    Args:
        input_ids, attention_mask: (B, N), padded on either side.
        vision: the VLM's visual inputs by name.

    Raises:
        InputError: the inputs do not fit each other.
    """
    vlm = model.vlm
    check_ids(input_ids, getattr(model.get_input_embeddings(), "num_embeddings", None))
    check_prompt(model.config, input_ids, attention_mask, vision)
    encoded = {kind: as_visual_features(output) for kind, output in vision.get("mm_encoder_outputs", {}).items()}
    if "pixel_values" in vision:
        encoded["image"] = encode_images(vlm, vision["pixel_values"], vision.get("image_grid_thw"))
    if "pixel_values_videos" in vision:
        videos = vlm.get_video_features(vision["pixel_values_videos"], vision["video_grid_thw"], return_dict=True)
        encoded["video"] = as_visual_features(videos)
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    grids = {key: vision[key] for key in POSITION_INPUTS if key in vision}
    positions = prompt_positions(vlm, model.config.backbone, input_ids, valid, **grids)
    return lay_out(model, input_ids, valid, encoded, Positions.of(positions))


def run_view(
    model: ZoomModel, view: CoarseView, first: int, last: int, plans: Sequence[LayerPlan | None] | None = None
) -> Tensor:
    """Decoder layers [first, last) over the view's hidden states; `plans` as for `run_layers`.

    Returns:
        (B, N, D) inputs of layer `last`.
    """
    return run_layers(
        model.vlm.get_decoder(),
        view.hidden,
        first,
        last,
        mask=view.mask,
        position_embeddings=view.position_embeddings,
        cache=view.cache,
        deepstack=view.deepstack,
        plans=plans,
    )


def run_to_branch(model: ZoomModel, view: CoarseView) -> CoarseView:
    """Decoder layers [0, K); the layers above do not run."""
    return replace(view, hidden=run_view(model, view, 0, model.config.branch_layer))
