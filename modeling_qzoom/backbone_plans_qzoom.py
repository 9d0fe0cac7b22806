"""Layer plans: who is updated in a decoder layer, who only gives keys and values, and who is absent.

A plan is data. Every saving of this project is a plan, and `backbone_layers_qzoom` runs all of them.

Axes: B rows, N columns (tokens) of the hidden states, C and U columns of a segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .rows_qzoom import gather, length_mask, pick


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of every row: first those that only give keys and values, then those that are updated.

    Both parts are left-padded; padding names column 0 and is 0 in the mask.

    Attributes:
        context: (B, C) columns that only give keys and values.
        updated: (B, U) columns that are updated.
        context_mask, updated_mask: the same shapes, long; 0 on padding and on tokens that a prompt's mask hides.
        keeps_padding: whether the padding of `updated` consists of columns of its own, which are updated as well.
    """

    context: Tensor
    updated: Tensor
    context_mask: Tensor
    updated_mask: Tensor
    keeps_padding: bool = False

    def pick(self, rows: Sequence[int]) -> "Segment":
        """The segment of some rows."""
        return replace(
            self,
            context=pick(self.context, rows),
            updated=pick(self.updated, rows),
            context_mask=pick(self.context_mask, rows),
            updated_mask=pick(self.updated_mask, rows),
        )


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer does: its segments in the order of the sequence.

    A token sees the tokens of earlier segments, the context of its own, and itself and those before it among the
    updated ones: causal attention, if within every segment the context comes first. Tokens in no segment are absent.
    """

    segments: tuple[Segment, ...]

    def pick(self, rows: Sequence[int]) -> "LayerPlan":
        """The plan of some rows."""
        return LayerPlan(tuple(segment.pick(rows) for segment in self.segments))

    @cached_property
    def mask(self) -> Tensor:
        """(B, n) long: which of a layer's cached columns hold tokens."""
        return torch.cat([part for seg in self.segments for part in (seg.context_mask, seg.updated_mask)], dim=1)


def last_token_plan(visible: Tensor) -> LayerPlan:
    """The plan of a layer of which only the last token is read: the cache is that of a plain layer.

    Args:
        visible: (B, N), 0 on padding and on hidden tokens.
    """
    rows, length = visible.shape
    columns = torch.arange(length, device=visible.device).expand(rows, -1)
    visible = visible.long()
    return LayerPlan(
        (Segment(columns[:, :-1], columns[:, -1:], visible[:, :-1], visible[:, -1:], keeps_padding=True),)
    )


def asking_token_plan(visible: Tensor, query_columns: Tensor) -> LayerPlan:
    """The plan of a layer of which one token per row is read, wherever it stands.

    Args:
        visible: (B, N), 0 on padding and on hidden tokens.
        query_columns: (B, 1) columns of the tokens that are read.
    """
    columns = torch.arange(visible.shape[1], device=visible.device).expand(len(visible), -1)
    queries = query_columns.to(visible.device)
    context_mask = (visible > 0) & (columns < queries)
    return LayerPlan((Segment(columns, queries, context_mask.long(), torch.ones_like(queries), keeps_padding=True),))


def keys_only_plan(visible: Tensor) -> LayerPlan:
    """The plan of a layer of which no state is read: the cache is that of a plain layer.

    Args:
        visible: (B, N), 0 on padding and on hidden tokens.
    """
    columns = torch.arange(visible.shape[1], device=visible.device).expand(len(visible), -1)
    visible = visible.long()
    return LayerPlan((Segment(columns, columns[:, :0], visible, visible[:, :0], keeps_padding=True),))


def subset_plan(columns: Tensor, mask: Tensor) -> LayerPlan:
    """The plan of a layer that updates some tokens and does not know the others.

    Args:
        columns: (B, U) left-padded columns of the tokens that are present.
        mask: (B, U), 0 on padding and on hidden tokens.
    """
    return LayerPlan((Segment(columns[:, :0], columns, mask[:, :0], mask.long()),))


def last_of(plan: LayerPlan) -> LayerPlan:
    """As a plan without context, for a layer of which only the last token is read; the cache is the same."""
    (segment,) = plan.segments
    columns, mask = segment.updated, segment.updated_mask
    return LayerPlan((Segment(columns[:, :-1], columns[:, -1:], mask[:, :-1], mask[:, -1:]),))


def without_plan(visible: Tensor, absent: Tensor) -> LayerPlan:
    """The plan of a layer that does not know some tokens; hidden ones are absent too.

    Args:
        visible: (B, N), 0 on padding and on hidden tokens.
        absent: (B, N) bool, the tokens that the others do not see.
    """
    present = ((visible > 0) & ~absent).tolist()
    rows = [[column for column, value in enumerate(row) if value] for row in present]
    return LayerPlan((_padded([([], row) for row in rows], visible.device),))


def frozen_plan(visible: Tensor, frozen: Tensor) -> LayerPlan:
    """The plan of a layer that updates all tokens but some, which give keys and values as they are.

    Hidden tokens are absent.

    Args:
        visible: (B, N), 0 on padding and on hidden tokens.
        frozen: (B, N) bool, the tokens that stay as they are.
    """
    rows = []
    for is_visible, is_frozen in zip((visible > 0).tolist(), frozen.tolist()):
        columns = [column for column, value in enumerate(is_visible) if value]
        rows.append(_segments(columns, is_frozen))
    count = max(len(row) for row in rows)
    rows = [[([], [])] * (count - len(row)) + row for row in rows]  # so that the last tokens share a segment
    device = visible.device
    return LayerPlan(tuple(_padded([row[index] for row in rows], device) for index in range(count)))


def _segments(columns: Sequence[int], is_frozen: Sequence[bool]) -> list[tuple[list[int], list[int]]]:
    """A row's columns in runs: frozen ones, and the updated ones behind them."""
    runs: list[tuple[list[int], list[int]]] = [([], [])]
    for column in columns:
        if is_frozen[column] and runs[-1][1]:
            runs.append(([], []))
        runs[-1][not is_frozen[column]].append(column)
    return runs


def _padded(rows: list[tuple[list[int], list[int]]], device: torch.device) -> Segment:
    """One segment of every row, left-padded."""
    context, context_mask = _left_padded([row[0] for row in rows], device)
    updated, updated_mask = _left_padded([row[1] for row in rows], device)
    return Segment(context, updated, context_mask, updated_mask)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, n) columns and their mask."""
    length = max(len(row) for row in rows)
    columns = [[0] * (length - len(row)) + row for row in rows]
    tensor = torch.tensor(columns, dtype=torch.long, device=device).view(len(rows), length)
    return tensor, length_mask([len(row) for row in rows], length, device)


def take_updated(plan: LayerPlan, hidden_states: Tensor) -> list[Tensor]:
    """Per segment (B, U, D): the states that the plan updates."""
    return [gather(hidden_states, segment.updated) for segment in plan.segments]


def write_updated(plan: LayerPlan, hidden_states: Tensor, states: Sequence[Tensor]) -> Tensor:
    """(B, N, D) hidden states with the updated ones in their place."""
    rows, length, width = hidden_states.shape
    device = states[0].device
    spare = hidden_states.new_zeros(rows, 1, width)  # where padding is written to
    hidden_states = torch.cat([hidden_states, spare], dim=1).to(device)
    index = torch.arange(rows, device=device)[:, None]
    for segment, updated in zip(plan.segments, states):
        columns = segment.updated.to(device)
        if not segment.keeps_padding:
            columns = columns.masked_fill(segment.updated_mask.to(device) == 0, length)
        hidden_states[index, columns] = updated.to(hidden_states.dtype)
    return hidden_states[:, :length]
