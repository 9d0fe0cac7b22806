"""Runs decoder layers [first, last) of an unchanged VLM, bit for bit as its own forward would.

No hooks and no state on modules, so two threads may run one model. Layers, norms and heads are called as modules, so
device placement, offloading and gradient checkpointing work as usual.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel

from .backbone_cache_qzoom import CACHE
from .errors_qzoom import UnsupportedError
from .prompt_qzoom import DeepStack


# what an attention implementation takes as its mask: a tensor, FlexAttention's block mask, or None
Mask = Any
# cos and sin, each (B, n, head_dim)
Rotary = tuple[Tensor, Tensor]


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
        mask: mask of the pass, from `causal_mask`.
        position_embeddings: cos and sin of the positions, from `rotary`.
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
