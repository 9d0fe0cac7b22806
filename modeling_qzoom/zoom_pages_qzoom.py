"""A page: what layers and branches make of the first tokens of a prompt, up to the end of an image.

Attention is causal, so none of it depends on what follows. Rows that begin with the same tokens and the same images
read them once and run only the rest of their own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_cache_qzoom import layer_states, set_layer_states
from .backbone_projections_qzoom import device_of
from .prompt_qzoom import VisualFeatures
from .rows_qzoom import length_mask, pad_left
from .zoom_model_state_qzoom import ModelState


# of one layer, each (heads, P, head_dim)
KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Beginning:
    """The first P tokens of a prompt, the last of which is that of an image or its end marker.

    Attributes:
        input_ids: (P,).
        positions: (A, P).
        images: features of its images.
    """

    input_ids: Tensor
    positions: Tensor
    images: VisualFeatures


@dataclass(frozen=True)
class BranchStates:
    """What a branch knows of a page.

    Attributes:
        kind: which tokens its layers update, `"full"` or `"light"`.
        layers: keys and values of its layers.
        outputs: (P, D) states behind the last of them; None where nobody reads them.
    """

    kind: str
    layers: tuple[KeysAndValues, ...]
    outputs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Page:
    """A page that a model has read (`read_page`), for any number of questions about it (`generate(…, page=…)`).

    It is never changed, so threads can share it.

    Attributes:
        beginning: its tokens, positions and image features.
        hidden: (P, D) inputs of layer K.
        lower: keys and values of layers [0, K).
        upper: keys and values of layers [K, L); None if not read yet.
        gate, region: what the branches know of it; None if not read yet, or if there is no gate.
        digests: of the images' pixel values, by which later calls recognise them.
        read_by: the model that read it; None for a page that lives for one call only.
    """

    beginning: Beginning
    hidden: Tensor
    lower: tuple[KeysAndValues, ...]
    upper: tuple[KeysAndValues, ...] | None = None
    gate: BranchStates | None = None
    region: BranchStates | None = None
    digests: tuple[bytes, ...] = ()
    read_by: ModelState | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that a call which continues from the page need not run again."""
        return len(self.beginning.input_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self))

    @property
    def device(self) -> torch.device:
        """Where most of it lies: the device of what layer K receives."""
        return self.hidden.device

    def to(self, device: torch.device | str | int) -> "Page":
        """The same page on another device. A call on a model elsewhere copies what it uses, each time."""
        moved = _moved(self, torch.device(device))
        assert isinstance(moved, Page)
        return moved

    def __repr__(self) -> str:
        images, size = len(self.digests), self.nbytes / 2**20
        return f"Page({self.tokens} tokens, {images} image{'s' * (images != 1)}, {size:.1f} MiB on {self.device})"


def _parts(value: Any) -> Sequence[Any]:
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    return value if isinstance(value, (list, tuple)) else ()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in dataclasses, lists and tuples."""
    return [value] if isinstance(value, Tensor) else [tensor for part in _parts(value) for tensor in _tensors(part)]


def _moved(value: Any, device: torch.device) -> Any:
    """The same dataclasses, lists and tuples with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, (type, ModelState)):
        return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value


@dataclass(frozen=True)
class Known:
    """What left-padded rows know of their first tokens, each from a page.

    Attributes:
        pages: one per row.
        firsts: column of each row's first token.
        counts: how many tokens of its page each row may use.
        end: columns [0, end) are known in every row; the others run.
    """

    pages: tuple[Page, ...]
    firsts: tuple[int, ...]
    counts: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, pages: Sequence[Page], firsts: Sequence[int], counts: Sequence[int]) -> "Known":
        """As many columns as every row knows."""
        end = min(first + count for first, count in zip(firsts, counts))
        return cls(tuple(pages), tuple(firsts), tuple(counts), end)

    def pick(self, rows: Sequence[int]) -> "Known":
        """Some rows, and the same columns."""
        firsts, counts = (tuple(part[row] for row in rows) for part in (self.firsts, self.counts))
        return Known(tuple(self.pages[row] for row in rows), firsts, counts, self.end)

    def trim(self, dropped: int) -> "Known":
        """The same rows without their first `dropped` columns, which are padding in all of them."""
        return Known.of(self.pages, [first - dropped for first in self.firsts], self.counts)

    def visible(self, device: torch.device) -> Tensor:
        """(B, end) long, 0 on padding."""
        return length_mask([max(self.end - first, 0) for first in self.firsts], self.end, device)

    def join(self, part: Callable[[Page], Tensor], device: torch.device, dim: int = 0) -> Tensor:
        """A part of the rows' pages in their columns [0, end).

        Args:
            part: the part of a page, with its P tokens along dimension `dim`.

        Returns:
            (B, …, end, …), zeros on padding.
        """
        lengths = [max(self.end - first, 0) for first in self.firsts]
        if len(set(map(id, self.pages))) == 1 and len(set(lengths)) == 1 and lengths[0] == self.end:
            shared = part(self.pages[0]).narrow(dim, 0, self.end).to(device)
            return shared.expand(len(self.pages), *shared.shape)
        states = [part(page).narrow(dim, 0, length).to(device) for page, length in zip(self.pages, lengths)]
        return pad_left(states, self.end, dim)

    def fill(
        self,
        cache: DynamicCache,
        layers: Iterable[Any],
        part: Callable[[Page], tuple[KeysAndValues, ...]],
        device: torch.device,
    ) -> None:
        """Puts keys and values of the known columns into a cache.

        Args:
            cache: holds nothing of these layers yet.
            layers: the layers, which know their places in the cache.
            part: the pages' keys and values of these layers.
            device: where offloaded layers run.
        """
        for number, layer in enumerate(layers):
            keys, values = (self._join_one(part, number, kind, device_of(layer, device)) for kind in (0, 1))
            set_layer_states(cache, layer.self_attn.layer_idx, keys, values)

    def _join_one(
        self, part: Callable[[Page], tuple[KeysAndValues, ...]], number: int, kind: int, device: torch.device
    ) -> Tensor:
        """(B, heads, end, head_dim) keys (kind 0) or values (kind 1) of one layer."""
        return self.join(lambda page: part(page)[number][kind], device, dim=1)


def row_states(
    cache: DynamicCache, layers: Iterable[Any], row: int, columns: Sequence[Tensor]
) -> tuple[KeysAndValues, ...]:
    """Keys and values of one row.

    Args:
        layers: the layers, which know their places in the cache.
        columns: per layer (P,), which of its cached columns.
    """
    states = []
    for layer, picked in zip(layers, columns):
        keys, values = layer_states(cache, layer.self_attn.layer_idx)
        picked = picked.to(keys.device)
        states.append((keys[row].index_select(1, picked), values[row].index_select(1, picked)))
    return tuple(states)
