"""Parts of a batch that ran apart, and all rows in one left-padded batch again."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_cache_qzoom import LayerMasks, layer_states, set_layer_states
from .rows_qzoom import Positions, pad_left


@dataclass(frozen=True)
class Prefill:
    """A batch after all decoder layers.

    Attributes:
        last_hidden: (B, D) state of each row's last token, before the final norm.
        mask: (B, M) of the rows' sequences, crops included; None where the prompts' own holds.
        positions: positions of the same tokens; None where the prompts' own hold.
        layer_masks: what the layers hold, where they hold different tokens.
    """

    last_hidden: Tensor
    mask: Tensor | None = None
    positions: Positions | None = None
    layer_masks: LayerMasks | None = None


@dataclass(frozen=True)
class Part:
    """Some rows after all decoder layers.

    Attributes:
        rows: indices of the rows in the batch.
        last_hidden: (b, D) state of the last token, before the final norm.
        cache: keys and values of all layers.
        positions: positions of all tokens, float32.
        mask: (b, n) long, 0 on padding and on tokens that a prompt's own mask hides.
        layer_masks: what the layers hold; None where all hold the tokens of `mask`.
    """

    rows: list[int]
    last_hidden: Tensor
    cache: DynamicCache
    positions: Positions
    mask: Tensor
    layer_masks: LayerMasks | None = None

    def mask_of(self, layer: int) -> Tensor:
        """(b, n) of what a layer holds."""
        return self.mask if self.layer_masks is None else self.layer_masks.of(layer)


def merge_parts(parts: list[Part], cache: DynamicCache, layers: int) -> Prefill:
    """All rows in one left-padded batch, in their original order, keys and values in `cache`.

    Layer 0, by whose length transformers knows how many tokens a cache holds, is padded to the rows' own length.
    """
    places = sorted((row, number, index) for number, part in enumerate(parts) for index, row in enumerate(part.rows))
    order = [(number, index) for _, number, index in places]
    last_hidden = torch.stack([parts[number].last_hidden[index] for number, index in order])
    length = max(part.mask.shape[1] for part in parts)
    mask = pad_left([parts[number].mask[index].to(last_hidden.device) for number, index in order], length)
    positions = Positions.stack([parts[number].positions.row(index) for number, index in order], length)

    whole = tuple(id(part.mask) for part in parts)
    layouts: dict[tuple[int, ...], _Layout] = {}
    masks, numbers, by_layer = [mask], {(whole, length): 0}, []
    for layer in range(layers):
        held = [part.mask_of(layer) for part in parts]
        key = tuple(id(part) for part in held)
        if key not in layouts:
            layouts[key] = _Layout.of([part.mask for part in parts], held, order)
        layout = layouts[key]
        layer_length = length if layer == 0 else layout.length
        states = [layer_states(part.cache, layer) for part in parts]
        set_layer_states(
            cache, layer, *(layout.gather([pair[kind] for pair in states], layer_length) for kind in (0, 1))
        )
        if (key, layer_length) not in numbers:
            masks.append(layout.mask(layer_length).to(mask))
            numbers[key, layer_length] = len(masks) - 1
        by_layer.append(numbers[key, layer_length])
    layer_masks = LayerMasks(tuple(masks), tuple(by_layer)) if len(masks) > 1 else None
    return Prefill(last_hidden, mask, positions, layer_masks)


@dataclass(frozen=True)
class _Layout:
    """Where the merged rows of some layers come from.

    Attributes:
        order: per row, its part and its index in it.
        columns: per row, the cached columns that it keeps; None for all of its part.
        held: per part, which columns hold tokens.
    """

    order: list[tuple[int, int]]
    columns: list[Tensor | None]
    held: list[Tensor]

    @classmethod
    def of(cls, whole: list[Tensor], held: list[Tensor], order: list[tuple[int, int]]) -> "_Layout":
        """The layout of layers that hold `held`; where that is not all of a part's sequence, its holes are closed."""
        columns = [
            None if held[number] is whole[number] else held[number][index].nonzero()[:, 0] for number, index in order
        ]
        return cls(order, columns, held)

    @property
    def length(self) -> int:
        """Number of columns of the longest row."""
        return max(
            self.held[number].shape[1] if columns is None else len(columns)
            for (number, _), columns in zip(self.order, self.columns)
        )

    def mask(self, length: int) -> Tensor:
        """(B, length) of what the merged layers hold."""
        rows = []
        for (number, index), columns in zip(self.order, self.columns):
            held = self.held[number][index]
            rows.append(held if columns is None else held[columns])
        return pad_left([row.to(rows[0].device) for row in rows], length)

    def gather(self, states: list[Tensor], length: int) -> Tensor:
        """(B, heads, length, head_dim) of the parts' (b, heads, n, head_dim)."""
        if len(states) == 1 and states[0].shape[2] == length and all(columns is None for columns in self.columns):
            return states[0]
        rows = []
        for (number, index), columns in zip(self.order, self.columns):
            row = states[number][index]
            rows.append(row if columns is None else row.index_select(1, columns.to(row.device)))
        return pad_left(rows, length, dim=1)
