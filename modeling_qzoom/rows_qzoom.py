"""Rows of a batch: picked, gathered by column, padded; and their positions.

Axes: B rows, N columns (tokens), A axes of a position (3 with M-RoPE: t, h, w; otherwise 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def pick(tensor: Tensor, rows: Sequence[int], dim: int = 0) -> Tensor:
    """`tensor` at `rows` along `dim`; itself when the rows are all of them."""
    if list(rows) == list(range(tensor.shape[dim])):
        return tensor
    return tensor.index_select(dim, torch.tensor(rows, device=tensor.device))


def gather(states: Tensor, columns: Tensor) -> Tensor:
    """(B, N, …) at per-row (B, m) columns → (B, m, …)."""
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, columns.to(states.device)]


def pad_left(rows: list[Tensor], length: int, dim: int = 0) -> Tensor:
    """Stacks rows along a new first dimension, zeros in front of the shorter ones along `dim`."""
    padded = []
    for row in rows:
        shape = list(row.shape)
        shape[dim] = length - shape[dim]
        padded.append(torch.cat([row.new_zeros(shape), row], dim=dim))
    return torch.stack(padded)


def length_mask(lengths: list[int], length: int, device: torch.device) -> Tensor:
    """(B, length) long: ones at the right end, as many as a row is long."""
    columns = torch.arange(length, device=device)
    return (columns >= length - torch.tensor(lengths, device=device)[:, None]).long()


@dataclass(frozen=True)
class Positions:
    """Positions of a batch of tokens.

    Attributes:
        values: (A, B, N), whole or fractional numbers.
    """

    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Positions":
        """From what transformers passes around: (B, N), (3, B, N), or (4, B, N) with the text's positions in front."""
        return cls(tensor[None] if tensor.ndim == 2 else tensor[-3:])

    @classmethod
    def stack(cls, rows: list[Tensor], length: int) -> "Positions":
        """Rows (A, n), left-padded with zeros to `length`."""
        return cls(pad_left(rows, length, dim=1).transpose(0, 1).contiguous())

    def for_decoder(self) -> Tensor:
        """(3, B, N), or (B, N) with one axis: as a decoder takes them."""
        return self.values if len(self.values) > 1 else self.values[0]

    def row(self, row: int) -> Tensor:
        """(A, N) of one row."""
        return self.values[:, row]

    def pick(self, rows: Sequence[int]) -> "Positions":
        """The positions of some rows."""
        return Positions(pick(self.values, rows, 1))

    def last(self, length: int) -> "Positions":
        """The positions of the last columns."""
        return Positions(self.values[..., -length:])

    def repeat(self, times: int) -> "Positions":
        """Every row so many times in a row, as beams want them."""
        return Positions(self.values.repeat_interleave(times, dim=1))
