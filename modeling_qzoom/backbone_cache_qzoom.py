"""The cache of keys and values: what transformers calls it, what a layer holds, and what travels on it."""

import inspect

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask


# (B, 1) on a cache: how far the M-RoPE positions run ahead of the number of tokens
POSITION_OFFSET = "qzoom_position_offset"


# What transformers calls the cache: as an argument, in the keyword arguments of generate, in outputs. 5.24 renamed it,
# and the old name warns there.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


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


_ZOOMED = "qzoom_holds_crops"  # set on caches


def mark_zoomed(cache: Cache) -> None:
    """Notes on a cache that it holds crops, so that no later turn counts its tokens as the prompt's."""
    setattr(cache, _ZOOMED, True)


def refuse_zoomed_cache(cache: Cache | None) -> None:
    """Raises:
    ValueError: the cache holds crops of an earlier turn.
    """
    if cache is not None and getattr(cache, _ZOOMED, False) and cache.get_seq_length() > 0:
        raise ValueError(
            "past_key_values comes from a turn that zoomed: it holds a crop that the prompt does not, and where the "
            "crop goes is decided anew for every question. Pass the whole conversation without a cache."
        )
