"""The coarse pass: the whole prompt through decoder layers [0, K)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from .backbone_layers_qzoom import Mask, Rotary, causal_mask, rotary, run_layers
from .prompt_checks_qzoom import check_ids, check_prompt
from .prompt_qzoom import POSITION_INPUTS, DeepStack, as_visual_features, embed_prompt, encode_images, prompt_positions


@dataclass
class CoarseView:
    """A batch of prompts after decoder layer K.

    Attributes:
        input_ids, valid: (B, N); `valid` is 0 on padding.
        positions: (3, B, N) or (B, N).
        position_embeddings: cos and sin, each (B, N, head_dim).
        mask: the causal mask of the pass.
        embeds: (B, N, D) inputs of layer 0.
        deepstack: what the first layers added to them.
        hidden: (B, N, D) inputs of layer K.
    """

    input_ids: Tensor
    valid: Tensor
    positions: Tensor
    position_embeddings: Rotary
    mask: Mask
    embeds: Tensor
    deepstack: DeepStack | None
    hidden: Tensor


def coarse_view(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, vision: dict[str, Any]
) -> CoarseView:
    """Embeds a batch of prompts; `hidden` is still the input of layer 0.

    Args:
        input_ids, attention_mask: (B, N), padded on either side.
        vision: the VLM's visual inputs by name.
    """
    vlm, decoder, config = model.vlm, model.vlm.get_decoder(), model.config
    check_ids(input_ids, getattr(model.get_input_embeddings(), "num_embeddings", None))
    check_prompt(config, input_ids, attention_mask, vision)
    encoded = {kind: as_visual_features(output) for kind, output in vision.get("mm_encoder_outputs", {}).items()}
    if "pixel_values" in vision:
        encoded["image"] = encode_images(vlm, vision["pixel_values"], vision.get("image_grid_thw"))
    if "pixel_values_videos" in vision:
        videos = vlm.get_video_features(vision["pixel_values_videos"], vision["video_grid_thw"], return_dict=True)
        encoded["video"] = as_visual_features(videos)
    embeds, deepstack = embed_prompt(vlm, input_ids, encoded.get("image"), encoded.get("video"))
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    grids = {key: vision[key] for key in POSITION_INPUTS if key in vision}
    positions = prompt_positions(vlm, config.backbone, input_ids, valid, **grids)
    positions = positions[-3:] if positions.ndim == 3 else positions
    position_embeddings = rotary(decoder, embeds, positions)
    mask = causal_mask(decoder, embeds, valid, None)
    return CoarseView(input_ids, valid, positions, position_embeddings, mask, embeds, deepstack, embeds)


def run_to_branch(model: PreTrainedModel, view: CoarseView) -> CoarseView:
    """Decoder layers [0, K); the layers above are never run."""
    hidden = run_layers(
        model.vlm.get_decoder(),
        view.embeds,
        0,
        model.config.branch_layer,
        mask=view.mask,
        position_embeddings=view.position_embeddings,
        deepstack=view.deepstack,
    )
    return replace(view, hidden=hidden)
