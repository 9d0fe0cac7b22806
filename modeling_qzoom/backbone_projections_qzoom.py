"""Queries, keys and values of single tokens, as a decoder layer's own attention would make them.

Norms and projections are called as modules, so quantized, offloaded and adapted ones do what they do in their layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .rows_qzoom import gather


# cos and sin, each (B, n, head_dim)
Rotary = tuple[Tensor, Tensor]


def rotary_at(position_embeddings: Rotary, columns: Tensor) -> Rotary:
    """cos and sin, each (B, m, head_dim), at per-row (B, m) columns."""
    cos, sin = position_embeddings
    return gather(cos, columns), gather(sin, columns)


def rotate(heads: Tensor, position_embeddings: Rotary) -> Tensor:
    """Rotary embedding of (B, n, heads, head_dim) states with (B, n, head_dim) cos and sin."""
    cos, sin = (part.to(heads.device, heads.dtype).unsqueeze(2) for part in position_embeddings)
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-right, left], dim=-1) * sin


def project_heads(
    states: Tensor, projection: nn.Module, norm: nn.Module | None, head_dim: int, rotary: Rotary | None
) -> Tensor:
    """Heads of normed hidden states.

    Args:
        states: (B, n, D) after the layer's input norm.
        projection: the layer's q_proj, k_proj or v_proj.
        norm: its norm of single heads, where it has one.
        rotary: cos and sin of the same tokens; None leaves the heads unrotated.

    Returns:
        (B, n, heads, head_dim).
    """
    heads = projection(states).unflatten(-1, (-1, head_dim))
    heads = heads if norm is None else norm(heads)
    return heads if rotary is None else rotate(heads, rotary)


def keys_and_values(layer: Any, hidden_states: Tensor, position_embeddings: Rotary) -> tuple[Tensor, Tensor]:
    """What a decoder layer would cache for tokens that it does not update.

    Args:
        layer: decoder layer of the backbone's own class.
        hidden_states: (B, n, D), what the layer receives.
        position_embeddings: cos and sin of the same tokens.

    Returns:
        Keys and values, each (B, heads, n, head_dim).
    """
    attention = layer.self_attn
    device = device_of(layer.input_layernorm, hidden_states.device)
    normed = layer.input_layernorm(hidden_states.to(device))  # (B, n, D)
    norm = getattr(attention, "k_norm", None)
    keys = project_heads(normed, attention.k_proj, norm, attention.head_dim, position_embeddings)
    values = project_heads(normed, attention.v_proj, None, attention.head_dim, None)
    return keys.transpose(1, 2), values.transpose(1, 2)


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """A module's device; offloaded modules, which are on none, fetch their inputs from the default one themselves."""
    weight = next(module.parameters(), None)
    return default if weight is None or weight.is_meta else weight.device
