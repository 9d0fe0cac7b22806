"""Decoding steps on a cache whose layers hold different tokens, which the VLM's own step takes for equally long."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from .backbone_cache_qzoom import LayerMasks, one_layer
from .backbone_layers_qzoom import Mask, causal_mask, rotary, run_layers
from .rows_qzoom import Positions


def decode(
    vlm: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, cache: Cache, layer_masks: LayerMasks
) -> Tensor:
    """Runs new text tokens through all layers, each on what it has cached.

    Args:
        input_ids: (B, n) ids of text.
        position_ids: (B, n), (3, B, n) or (4, B, n) positions, as `generate` hands them out.
        cache: keys and values of the earlier tokens; extended.
        layer_masks: which of them the prefill wrote, and for which layers.

    Returns:
        (B, n, D) after the final norm.
    """
    decoder: Any = vlm.get_decoder()
    hidden = vlm.get_input_embeddings()(input_ids)
    position_embeddings = rotary(decoder, hidden, Positions.of(position_ids).for_decoder())
    masks: dict[int, Mask] = {}
    for first, last, number in layer_masks.runs():
        if number not in masks:
            masks[number] = _step_mask(decoder, hidden, layer_masks.masks[number], one_layer(cache, first))
        hidden = run_layers(
            decoder, hidden, first, last, mask=masks[number], position_embeddings=position_embeddings, cache=cache
        )
    return decoder.norm(hidden)


def _step_mask(decoder: Any, hidden_states: Tensor, written: Tensor, cached: Cache) -> Mask:
    """The mask of new tokens on a cache whose first (B, m) columns the prefill wrote, and whose others are text."""
    length, _ = cached.get_mask_sizes(hidden_states.shape[1], 0)  # of a static cache, room for later tokens included
    rest = written.new_ones(len(hidden_states), length - written.shape[1])
    return causal_mask(decoder, hidden_states, torch.cat([written, rest], dim=1), cached)
