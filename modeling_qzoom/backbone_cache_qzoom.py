"""The cache of keys and values: what transformers calls it, what a layer holds, and what travels on it."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from .errors_qzoom import InputError, UnsupportedError
from .rows_qzoom import pick


# What transformers calls the cache: as an argument, in the keyword arguments of generate, in outputs. 5.24 renamed it,
# and the old name warns there.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache of a call, which may name it either way whatever transformers is installed.

    Raises:
        InputError: both names are used.
    """
    if past_key_values is not None and cache is not None:
        raise InputError(
            "past_key_values and cache are two names of one argument; pass one of them. (A peft that is too old for "
            "the installed transformers passes both: install a pair that goes together.)"
        )
    return cache if past_key_values is None else past_key_values


def name_cache(kwargs: dict[str, Any]) -> None:
    """Gives the cache of a call the name that the installed transformers has for it.

    Args:
        kwargs: keyword arguments of `generate`; changed.

    Raises:
        InputError: both names are used.
    """
    cache = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
    if cache is not None:
        kwargs[CACHE] = cache


@dataclass(frozen=True)
class Past:
    """What some layers know of the tokens in front of those that they run.

    Attributes:
        cache: keys and values (B, heads, P, head_dim) of these tokens in every one of the layers, which extend it.
        visible: (B, P) long, 0 on padding.
        states: (B, P, D) that the last of the layers made of them; None where nobody reads it.
    """

    cache: DynamicCache
    visible: Tensor
    states: Tensor | None = None


@dataclass(frozen=True)
class LayerMasks:
    """Which tokens the layers of a cache hold, where they hold different ones.

    Attributes:
        masks: the distinct masks, (B, n_i) long each, 0 on padding and on hidden tokens; of the prefill alone.
        by_layer: per decoder layer the index of its mask.
    """

    masks: tuple[Tensor, ...]
    by_layer: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Neighbouring layers [first, last) with one mask, and its index."""
        first = 0
        for last in range(1, len(self.by_layer) + 1):
            if last == len(self.by_layer) or self.by_layer[last] != self.by_layer[first]:
                yield first, last, self.by_layer[first]
                first = last

    def of(self, layer: int) -> Tensor:
        """(B, n) mask of a layer."""
        return self.masks[self.by_layer[layer]]

    def repeat(self, times: int) -> "LayerMasks":
        """Every row so many times in a row, as beams want them."""
        return replace(self, masks=tuple(mask.repeat_interleave(times, dim=0) for mask in self.masks))


@dataclass(frozen=True)
class CacheNotes:
    """What later calls must know of a cache besides its keys and values.

    Attributes:
        position_offset: (B, 1), how far the M-RoPE positions run ahead of the number of tokens; None if not at all.
        holds_crops: whether it holds a crop, which the prompt does not.
        layer_masks: what its layers hold, where they hold different tokens.
    """

    position_offset: Tensor | None = None
    holds_crops: bool = False
    layer_masks: LayerMasks | None = None


def notes_of(cache: Cache | None) -> CacheNotes:
    """The notes on a cache; those of an unwritten one where there are none."""
    notes: CacheNotes | None = getattr(cache, "qzoom_notes", None)
    return CacheNotes() if notes is None else notes


def write_notes(
    cache: Cache,
    *,
    position_offset: Tensor | None = None,
    holds_crops: bool | None = None,
    layer_masks: LayerMasks | None = None,
) -> None:
    """Adds to the notes on a cache what is given.

    They are an attribute of the cache, whoever made it: they must go with it from turn to turn and into its copies.
    """
    notes = notes_of(cache)
    if position_offset is not None:
        notes = replace(notes, position_offset=position_offset)
    if holds_crops is not None:
        notes = replace(notes, holds_crops=holds_crops)
    if layer_masks is not None:
        notes = replace(notes, layer_masks=layer_masks)
    cache.qzoom_notes = notes


def refuse_zoomed_cache(cache: Cache | None) -> None:
    """Refuses to go on from a turn that zoomed.

    Raises:
        UnsupportedError: the cache holds crops of an earlier turn.
    """
    if cache is not None and notes_of(cache).holds_crops and cache.get_seq_length() > 0:
        raise UnsupportedError(
            "past_key_values comes from a turn that zoomed: it holds a crop that the prompt does not, and where the "
            "crop goes is decided anew for every question. Pass the whole conversation without a cache."
        )


def zoomable_cache(cache: Cache | None) -> DynamicCache:
    """The cache of a call that may zoom: a plain growing one, whose layers may differ in length for a while.

    Raises:
        UnsupportedError: another kind of cache, or none.
    """
    is_plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if cache is None or not is_plain or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kind = "no cache" if cache is None else type(cache).__name__
        kind = f"an offloaded {kind}" if getattr(cache, "offloading", False) else kind
        raise UnsupportedError(
            "zooming needs a plain DynamicCache, because the crop's length is known only after the coarse pass; "
            f"this call uses {kind}. Leave use_cache and cache_implementation at their defaults (or pass "
            "cache_implementation='static' instead of a static cache), or pass zoom='never'."
        )
    return cache


def is_static(cache: Cache | None) -> bool:
    """Whether a cache is a static one on the model's devices, such as `generate` makes where it is asked to."""
    return type(cache) is StaticCache and not getattr(cache, "offloading", False)


# lengths of static caches are rounded up, because a compiled step is compiled anew for every other length
STATIC_STEP = 64


def static_copy(config: PreTrainedConfig, cache: DynamicCache, length: int) -> StaticCache:
    """A static cache with the contents of a growing one, and with its notes.

    Args:
        config: the decoder's configuration.
        cache: the growing cache; it is emptied layer by layer, so that no two copies of all layers exist.
        length: number of tokens that it must hold in the end.
    """
    static = StaticCache(config=config, max_cache_len=-(-length // STATIC_STEP) * STATIC_STEP)
    for index, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, index)
        layer.keys = layer.values = None
    static.qzoom_notes = notes_of(cache)
    return static


def one_layer(cache: Cache, layer: int) -> Cache:
    """A layer of a cache as a cache of its own, for masks, which are made for a cache's first layer."""
    return Cache(layers=[cache.layers[layer]])


def layer_states(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, n, head_dim) that a layer has cached."""
    return cache.layers[layer].keys, cache.layers[layer].values


def set_layer_states(cache: DynamicCache, layer: int, keys: Tensor, values: Tensor) -> None:
    """Replaces what a layer has cached, without a copy."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    if not cache.layers[layer].is_initialized:
        cache.layers[layer].lazy_initialization(keys, values)
    cache.layers[layer].keys, cache.layers[layer].values = keys, values


def _gather_cached(states: Tensor, columns: Tensor) -> Tensor:
    """(B, heads, n, d) at per-row (B, m) columns → (B, heads, m, d)."""
    columns = columns.to(states.device)
    index = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)


def pick_cache(config: PreTrainedConfig, cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A new cache with all columns of some rows, in the layers that hold any."""
    part = DynamicCache(config=config)
    for layer, entry in enumerate(cache.layers):
        if entry.is_initialized:
            set_layer_states(part, layer, *(pick(states, rows) for states in layer_states(cache, layer)))
    return part


def take_columns(
    config: PreTrainedConfig, cache: DynamicCache, layers: int, rows: Sequence[int], columns: Tensor
) -> DynamicCache:
    """A new cache with some rows' keys and values.

    Args:
        config: the decoder's configuration.
        layers: layers [0, layers) are taken.
        rows: indices of the b rows.
        columns: (b, m) of each row.
    """
    part = DynamicCache(config=config)
    for layer in range(layers):
        keys, values = (_gather_cached(pick(states, rows), columns) for states in layer_states(cache, layer))
        set_layer_states(part, layer, keys, values)
    return part


def take_last(
    config: PreTrainedConfig, cache: DynamicCache, layers: int, rows: Sequence[int], length: int
) -> DynamicCache:
    """A new cache with the last `length` columns of some rows, in layers [0, layers)."""
    part = DynamicCache(config=config)
    for layer in range(layers):
        keys, values = (pick(states, rows)[:, :, -length:] for states in layer_states(cache, layer))
        set_layer_states(part, layer, keys, values)
    return part
