"""Runs decoder layers [first, last) of an unchanged VLM: bit for bit as its own forward would, or under layer plans.

No hooks and no state on modules, so two threads may run one model. Layers, norms and heads are called as modules, so
device placement, offloading and gradient checkpointing work as usual.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel

from .backbone_cache_qzoom import CACHE, layer_states, set_layer_states
from .backbone_plans_qzoom import LayerPlan, take_updated, write_updated
from .backbone_projections_qzoom import Rotary, keys_and_values, rotary_at
from .errors_qzoom import UnsupportedError
from .prompt_qzoom import DeepStack
from .rows_qzoom import gather


# what an attention implementation takes as its mask: a tensor, FlexAttention's block mask, or None
Mask = Any


def check_decoder(decoder: PreTrainedModel) -> None:
    """Checks that every layer of a decoder attends to all earlier tokens.

    Raises:
        UnsupportedError: the decoder has sliding-window layers, whose caches cannot hold two views of one image.
    """
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedError(
            f"Q-Zoom needs full attention in every decoder layer; this backbone has {sorted(kinds)}."
        )


def causal_mask(
    decoder: PreTrainedModel, hidden_states: Tensor, attention_mask: Tensor | None, cache: Cache | None
) -> Mask:
    """The mask in the form that the decoder's attention implementation wants.

    Args:
        hidden_states: (B, n, D) of the queries.
        attention_mask: (B, cached + n) of all keys; None when nothing is padded.
        cache: holds the keys of earlier tokens, None when there are none.
    """
    return _causal_mask(decoder.config, hidden_states, attention_mask, cache)


def _causal_mask(
    config: PreTrainedConfig, hidden_states: Tensor, attention_mask: Tensor | None, cache: Cache | None
) -> Mask:
    # positions stay out: fractional ones look like packed sequences
    return create_causal_mask(config, hidden_states, attention_mask, **{CACHE: cache})


def mask_behind(config: PreTrainedConfig, hidden_states: Tensor, attention_mask: Tensor, past: int) -> Mask:
    """As `causal_mask`, behind so many tokens that a layer has already cached.

    Args:
        config: the decoder's configuration.
        attention_mask: (B, past + n).
    """
    if not past:
        return _causal_mask(config, hidden_states, attention_mask, None)
    cached = DynamicCache()  # of which only the length is read
    cached.update(*[hidden_states.new_zeros(1, 1, 1, 1).expand(len(hidden_states), 1, past, 1)] * 2, 0)
    return _causal_mask(config, hidden_states, attention_mask, cached)


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
    cache: DynamicCache | None = None,
    deepstack: DeepStack | None = None,
    plans: Sequence[LayerPlan | None] | None = None,
    cached: Tensor | None = None,
) -> Tensor:
    """Decoder layers [first, last).

    Args:
        hidden_states: (B, n, D), what layer `first` receives.
        mask: mask of the pass, from `causal_mask`.
        position_embeddings: cos and sin of the positions, from `rotary`.
        cache: receives keys and values.
        plans: per layer who takes part; None for a layer that updates all tokens. Planned layers write
            (B, heads, n, head_dim) of the tokens that take part, in the order of the plan.
        cached: (B, P) long, 0 on padding: earlier tokens, whose keys and values the cache holds for every one of the
            layers; None where planned layers start with nothing cached.

    Returns:
        (B, n, D), what layer `last` would receive. Tokens that a plan does not update stay as they were.
    """
    layers = cast(nn.ModuleList, decoder.layers)
    index = first
    while index < last:
        plan = None if plans is None else plans[index - first]
        if plan is None:
            hidden_states = layers[index](
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=None,
                use_cache=cache is not None,
                **{CACHE: cache},
            )
            end = index + 1
        else:
            end = _end_of_run(plan, plans or (), first, index, deepstack)
            hidden_states = _run_planned(decoder, hidden_states, index, end, plan, position_embeddings, cache, cached)
        if deepstack is not None:
            hidden_states = deepstack.add(hidden_states, end - 1)
        index = end
    return hidden_states


def _end_of_run(
    plan: LayerPlan, plans: Sequence[LayerPlan | None], first: int, index: int, deepstack: DeepStack | None
) -> int:
    """Where the neighbouring layers of one plan end, between which no states need to be put back."""
    end = index + 1
    while end - first < len(plans) and plans[end - first] is plan:
        if deepstack is not None and end - 1 < len(deepstack.levels):
            break
        end += 1
    return end


class _LayerStates:
    """The keys and values of one layer while it runs under a plan, in place of a cache.

    A second update with the same states gives the same result, as gradient checkpointing needs.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None):
        self.before = self.after = (keys, values)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, with these behind them."""
        past_keys, past_values = self.before
        if past_keys is not None and past_values is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in ((past_keys, keys), (past_values, values)))
        self.after = keys, values
        return keys, values


def _run_planned(
    decoder: Any,
    hidden_states: Tensor,
    first: int,
    last: int,
    plan: LayerPlan,
    position_embeddings: Rotary,
    cache: DynamicCache | None,
    cached: Tensor | None,
) -> Tensor:
    """Neighbouring layers [first, last) of one plan, through the decoder's own modules."""
    updated = take_updated(plan, hidden_states)
    context = [gather(hidden_states, segment.context) for segment in plan.segments]
    at_context = [rotary_at(position_embeddings, segment.context) for segment in plan.segments]
    at_updated = [rotary_at(position_embeddings, segment.updated) for segment in plan.segments]
    masks = _segment_masks(decoder.layers[first].self_attn.config, plan, updated, cached)
    for layer in decoder.layers[first:last]:
        number_in_cache = layer.self_attn.layer_idx  # a branch counts on from layer K
        states = _LayerStates()
        if cache is not None and cached is not None and cached.shape[1]:
            states = _LayerStates(*layer_states(cache, number_in_cache))
        for number, mask in enumerate(masks):
            if context[number].shape[1]:
                states.update(*keys_and_values(layer, context[number], at_context[number]))
                states = _LayerStates(*states.after)
            if updated[number].shape[1]:
                updated[number] = _call(layer, updated[number], mask, at_updated[number], states)
                states = _LayerStates(*states.after)
        keys, values = states.after
        if cache is not None and keys is not None and values is not None:
            set_layer_states(cache, number_in_cache, keys, values)
    return write_updated(plan, hidden_states, updated)


def _segment_masks(
    config: PreTrainedConfig, plan: LayerPlan, updated: list[Tensor], cached: Tensor | None
) -> list[Mask]:
    """Per segment the mask of its updated tokens, on top of the cached ones; None where there are none."""
    masks, visible = [], plan.mask[:, :0]
    visible = visible if cached is None else cached.to(visible.device)
    for segment, states in zip(plan.segments, updated):
        visible = torch.cat([visible, segment.context_mask], dim=1)
        past = visible.shape[1]
        visible = torch.cat([visible, segment.updated_mask], dim=1)
        masks.append(mask_behind(config, states, visible, past) if states.shape[1] else None)
    return masks


def _call(layer: Any, hidden_states: Tensor, mask: Mask, position_embeddings: Rotary, states: _LayerStates) -> Tensor:
    """One decoder layer on top of states that it has already."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()):
        return layer(
            hidden_states,
            attention_mask=mask,
            position_embeddings=position_embeddings,
            position_ids=None,
            use_cache=True,
            **{CACHE: states},
        )
    # checkpointing takes a cache away that comes by its name, since a second run would fill it twice; not this one
    if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
        raise UnsupportedError(
            "reentrant gradient checkpointing gives no gradient to tokens that only give keys and values; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    given = {
        "hidden_states": hidden_states,
        "attention_mask": mask,
        "position_embeddings": position_embeddings,
        "position_ids": None,
        CACHE: states,
    }
    names = list(signature(layer.forward).parameters)
    by_place = names[: names.index(CACHE) + 1]
    by_name = {name: given[name] for name in given if name not in by_place}
    return layer(*(given.get(name) for name in by_place), **by_name)
