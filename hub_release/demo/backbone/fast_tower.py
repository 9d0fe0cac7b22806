"""The stock vision tower with the same weights, made fast to train: patches as one product, views side by side."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)


class FlatPatchEmbed(Qwen2_5_VisionPatchEmbed):
    """The tower's patch embedding as one matrix product.

    On a CPU the backward pass of the convolution takes more time than all the rest of a training step. An image has
    two equal temporal copies, so their weights are added and one copy is enough.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(n, 3 * 14 * 14) → (n, d)."""
        return linear(hidden_states, self.proj.weight.sum(2).flatten(1))


class SideBySideAttention(Qwen2_5_VLVisionAttention):
    """The tower's attention over all views at once, padded to the largest.

    Without FlashAttention the stock one goes through the views one by one, which leaves a GPU waiting for a hundred
    small views.
    """

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        slots: Tensor,
        seen: Tensor,
        **_: Any,
    ) -> Tensor:
        """(n, d) → (n, d).

        Args:
            slots: (n,) place of every patch among the padded views.
            seen: (views, width) True where there is a patch.
        """
        parts = self.qkv(hidden_states).reshape(len(slots), 3, self.num_heads, -1).unbind(1)
        rotated = apply_rotary_pos_emb_vision(parts[0], parts[1], *position_embeddings)
        padded = []
        for value in (*rotated, parts[2]):
            room = value.new_zeros(seen.numel(), *value.shape[1:]).index_copy(0, slots, value)
            padded.append(room.view(*seen.shape, *value.shape[1:]).transpose(1, 2))
        mask = seen[:, None, None, :].expand(-1, 1, seen.shape[1], -1)
        query, key, value = padded
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        return self.proj(mixed.transpose(1, 2).reshape(seen.numel(), -1).index_select(0, slots))


@contextmanager
def fast_tower(tower: Any, side_by_side: bool | None = None) -> Iterator[None]:
    """Within it the tower takes one temporal copy of its patches, and what `view_batch.encode` passes beside them.

    Args:
        side_by_side: attend to all views at once; by default on a GPU. On a CPU padding costs more than it saves.
    """
    swapped: list[tuple[nn.Module, type]] = [(tower.patch_embed, FlatPatchEmbed)]
    if tower.patch_embed.proj.weight.is_cuda if side_by_side is None else side_by_side:
        swapped += [(block.attn, SideBySideAttention) for block in tower.blocks]
    usual = [(part, type(part)) for part, _ in swapped]
    for part, kind in swapped:
        part.__class__ = kind
    try:
        yield
    finally:
        for part, kind in usual:
            part.__class__ = kind


def padded_slots(lengths: list[int]) -> Tensor:
    """Place of every patch, (n,), among views padded to a common width; see `padded_width`."""
    width = padded_width(lengths)
    return torch.cat([torch.arange(length) + number * width for number, length in enumerate(lengths)])


def padded_width(lengths: list[int]) -> int:
    """The largest length, rounded up to what fused attention kernels want of a mask."""
    return -(-max(lengths) // 8) * 8
