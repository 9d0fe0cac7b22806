"""Several views at once: as few tensors as travel cheaply between processes, and the vision tower's pass over them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids

from hub_release.demo.backbone.fast_tower import padded_slots, padded_width
from hub_release.demo.backbone.model import MERGE
from hub_release.demo.backbone.views import View, normalise


@dataclass
class ViewBatch:
    """What the tower needs of several views, as few tensors that travel cheaply between processes.

    Attributes:
        patches: (4 * tokens, 588) uint8.
        grids: (views, 3), t, h, w in patches; stays on the CPU.
        positions: (4 * tokens, 2) row and column of every patch.
        slots: (4 * tokens,) place of every patch where views are padded to a common width.
        labels: dense labels by name, as in `View`, of all views one after the other.
    """

    patches: Tensor
    grids: Tensor
    positions: Tensor
    slots: Tensor
    labels: dict[str, Tensor]

    def to(self, device: torch.device) -> "ViewBatch":
        """The same on a device."""
        labels = {name: value.to(device) for name, value in self.labels.items()}
        patches, positions, slots = (part.to(device) for part in (self.patches, self.positions, self.slots))
        return ViewBatch(patches, self.grids, positions, slots, labels)

    def layout(self) -> dict[str, Any]:
        """What the tower would work out from the grids, view by view, and what attention side by side needs."""
        lengths = self.grids.prod(1)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        width = padded_width(lengths.tolist())
        seen = torch.zeros(len(lengths) * width, dtype=torch.bool, device=self.slots.device)
        return {
            "position_ids": self.positions,
            "cu_seqlens": ends,
            # a window holds any view of the demo, so patches stay in reading order
            "window_index": torch.arange(int(ends[-1]) // MERGE**2, device=self.slots.device),
            "cu_window_seqlens": ends,
            "slots": self.slots,
            "seen": seen.index_fill(0, self.slots, True).view(-1, width),
        }


def stack_views(views: list[View]) -> ViewBatch:
    """Views in the order of their image tokens."""
    grids = torch.tensor([[1, MERGE * view.grid[0], MERGE * view.grid[1]] for view in views])
    return ViewBatch(
        torch.cat([view.patches for view in views]),
        grids,
        get_vision_position_ids(grids, MERGE),
        padded_slots(grids.prod(1).tolist()),
        {name: torch.cat([view.labels[name] for view in views]) for name in views[0].labels},
    )


def encode(tower: nn.Module, views: ViewBatch) -> tuple[Tensor, Tensor]:
    """Merged tokens (tokens, D) in reading order, and patch features (4 * tokens, d) in the processor's order.

    The tower has to be under `fast_tower`.
    """
    out = tower(normalise(views.patches), views.grids, **views.layout())
    return out.pooler_output, out.last_hidden_state
