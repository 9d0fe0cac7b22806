"""Rows of a batch: picked, gathered by column, padded."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _gather(states: Tensor, columns: Tensor) -> Tensor:
    """(B, n, …) at (B, m) columns → (B, m, …)."""
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, columns.to(states.device)]


def _gather_columns(states: Tensor, columns: Tensor) -> Tensor:
    """(B, heads, n, d) at per-row (B, m) columns → (B, heads, m, d)."""
    columns = columns.to(states.device)
    index = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)


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


def stack_positions(rows: list[Tensor], length: int) -> Tensor:
    """Rows of (3, n) or (n,) positions, left-padded → (3, B, length) or (B, length)."""
    stacked = pad_left(rows, length, dim=rows[0].ndim - 1)
    return stacked.transpose(0, 1) if stacked.ndim == 3 else stacked


def select_rows(tensor: Tensor, rows: Sequence[int], dim: int = 0) -> Tensor:
    """`tensor` at `rows` along `dim`; itself when the rows are all of them."""
    if list(rows) == list(range(tensor.shape[dim])):
        return tensor
    return tensor.index_select(dim, torch.tensor(rows, device=tensor.device))
