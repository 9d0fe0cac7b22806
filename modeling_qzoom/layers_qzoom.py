"""Runs decoder layers [first, last) of an unchanged VLM, bit for bit as its own forward would.

No hooks and no state on modules, so two threads may run one model. Layers, norms and heads are called as modules, so
device placement, offloading and gradient checkpointing work as usual.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel

from .backbones_qzoom import VisualFeatures, mismatch


# What transformers calls the cache: as an argument, in the keyword arguments of generate, in outputs. 5.24 renamed it,
# and the old name warns there.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# what an attention implementation takes as its mask: a tensor, FlexAttention's block mask, or None
Mask = Any
# cos and sin, each (B, n, head_dim)
Rotary = tuple[Tensor, Tensor]


class DeepStack:
    """Visual features that Qwen3-VL adds to the hidden states after its first decoder layers.

    Args:
        levels: one (n, D) tensor per level, rows in order of the visual tokens in the batch.
        mask: (B, N) bool, the visual tokens.
    """

    def __init__(self, levels: list[Tensor], mask: Tensor):
        self.levels = levels
        self.mask = mask

    def select(self, rows: list[int], length: int) -> "DeepStack":
        """Those of some rows, whose last `length` columns hold all their visual tokens."""
        chosen = torch.zeros(len(self.mask), dtype=torch.bool, device=self.mask.device)
        chosen[rows] = True
        keep = chosen[:, None].expand_as(self.mask)[self.mask]  # (n,)
        return DeepStack([level[keep.to(level.device)] for level in self.levels], self.mask[rows][:, -length:])

    def add(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Adds the features that belong behind decoder layer `layer`, if any."""
        if layer >= len(self.levels):
            return hidden_states
        features = self.levels[layer].to(hidden_states.device, hidden_states.dtype)
        mask = self.mask.to(hidden_states.device)
        hidden_states = hidden_states.clone()
        hidden_states[mask, :] = hidden_states[mask, :] + features
        return hidden_states


def check_decoder(decoder: PreTrainedModel) -> None:
    """Raises:
    ValueError: the decoder has sliding-window layers, whose caches cannot hold two views of one image.
    """
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"Q-Zoom needs full attention in every decoder layer; this backbone has {sorted(kinds)}.")


def causal_mask(
    decoder: PreTrainedModel, hidden_states: Tensor, attention_mask: Tensor | None, cache: Cache | None
) -> Mask:
    """The mask in the form that the decoder's attention implementation wants.

    Args:
        hidden_states: (B, n, D) of the queries.
        attention_mask: (B, cached + n) of all keys; None when nothing is padded.
        cache: holds the keys of earlier tokens, None when there are none.
    """
    # positions stay out: fractional ones look like packed sequences
    return create_causal_mask(decoder.config, hidden_states, attention_mask, **{CACHE: cache})


def rotary(decoder: PreTrainedModel, hidden_states: Tensor, positions: Tensor) -> Rotary:
    """cos and sin, each (B, n, head_dim), of (3, B, n) or (B, n) positions, fractional ones included."""
    return decoder.rotary_emb(hidden_states, positions.to(hidden_states.device))


def run_layers(
    decoder: nn.Module,
    hidden_states: Tensor,
    first: int,
    last: int,
    *,
    mask: Mask,
    position_embeddings: Rotary,
    cache: Cache | None = None,
    deepstack: DeepStack | None = None,
) -> Tensor:
    """Decoder layers [first, last).

    Args:
        hidden_states: (B, n, D), what layer `first` receives.
        mask: from `causal_mask`.
        position_embeddings: from `rotary`.
        cache: receives keys and values.

    Returns:
        (B, n, D), what layer `last` would receive.
    """
    layers = cast(nn.ModuleList, decoder.layers)
    for index in range(first, last):
        hidden_states = layers[index](
            hidden_states,
            attention_mask=mask,
            position_embeddings=position_embeddings,
            position_ids=None,
            use_cache=cache is not None,
            **{CACHE: cache},
        )
        if deepstack is not None:
            hidden_states = deepstack.add(hidden_states, index)
    return hidden_states


def embed_prompt(
    vlm: PreTrainedModel, input_ids: Tensor, images: VisualFeatures | None, videos: VisualFeatures | None
) -> tuple[Tensor, DeepStack | None]:
    """Token embeddings with the visual ones in place.

    Args:
        input_ids: (B, N).

    Returns:
        (B, N, D) embeddings, and the DeepStack features in token order where the family has them.
    """
    embeds = vlm.get_input_embeddings()(input_ids)
    config = vlm.config
    parts: list[tuple[Tensor, VisualFeatures]] = []
    for kind, features, token_id in (
        ("Image", images, config.image_token_id),
        ("Video", videos, getattr(config, "video_token_id", None)),
    ):
        if features is None:
            continue
        mask = torch.eq(input_ids, cast(int, token_id))  # (B, N)
        flat = torch.cat(features.embeds).to(embeds.device, embeds.dtype)  # (n, D)
        if int(mask.sum()) != len(flat):
            raise ValueError(mismatch(kind, int(mask.sum()), len(flat)))
        embeds = embeds.masked_scatter(mask[..., None].to(embeds.device), flat)
        parts.append((mask, features))
    if not parts or not parts[0][1].deepstack:
        return embeds, None
    visual = torch.stack([mask for mask, _ in parts]).any(0)  # (B, N)
    levels = []
    for level in range(len(parts[0][1].deepstack)):
        first = parts[0][1].deepstack[level][0]  # (n, D)
        joint = first.new_zeros(int(visual.sum()), first.shape[-1])
        for mask, features in parts:
            flat = torch.cat(features.deepstack[level])
            joint[mask[visual].to(joint.device)] = flat.to(joint.device)
        levels.append(joint)
    return embeds, DeepStack(levels, visual)


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache of a call, which may name it either way whatever transformers is installed.

    Raises:
        ValueError: both names are used.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; pass one of them.")
    return cache if past_key_values is None else past_key_values


def is_dynamic(cache: Cache) -> bool:
    """Whether the cache is a plain growing one, whose layers may hold different lengths for a while."""
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    return plain and all(type(layer) is DynamicLayer for layer in cache.layers)


def layer_states(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, n, head_dim) that a layer has cached."""
    return cache.layers[layer].keys, cache.layers[layer].values


def set_layer_states(cache: DynamicCache, layer: int, keys: Tensor, values: Tensor) -> None:
    """Replaces what a layer has cached."""
    if len(cache.layers) > layer and cache.layers[layer].is_initialized:
        cache.layers[layer].keys, cache.layers[layer].values = keys, values
    else:
        cache.update(keys, values, layer)
