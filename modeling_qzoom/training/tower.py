"""Dense labels for the demo's vision tower: which digit, colour, shape and code lies under each patch and token."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .views import IGNORE, NO_DIGIT, NO_OBJECT, View, normalise


EMPTY = {"digit": NO_DIGIT, "color": NO_OBJECT, "shape": NO_OBJECT}
EMPTY_WEIGHT = 0.15
"""Most places are empty: at full weight "nothing here" drowns what the tower has to learn."""


class DenseHeads(nn.Module):
    """Linear probes on the tower, thrown away after training.

    Args:
        patch_size: Width of the patch features.
        token_size: Width of the merged tokens.
    """

    def __init__(self, patch_size: int, token_size: int) -> None:
        super().__init__()
        self.digit = nn.Linear(patch_size, NO_DIGIT + 1)
        self.color = nn.Linear(token_size, NO_OBJECT + 1)
        self.shape = nn.Linear(token_size, NO_OBJECT + 1)
        self.code = nn.Linear(token_size, 30)


def batch_inputs(views: list[View]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's pixel values (patches, 1176) and grids (views, 3) of a list of views."""
    grids = torch.tensor([[1, 2 * view.grid[0], 2 * view.grid[1]] for view in views])
    return normalise(torch.cat([view.patches for view in views])), grids


def encode(tower: nn.Module, views: list[View]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged tokens (tokens, D) in reading order, and patch features (4 * tokens, d) in the processor's order."""
    pixels, grids = batch_inputs(views)
    out = tower(pixels, grids)
    return out.pooler_output, out.last_hidden_state


def dense_loss(
    heads: DenseHeads, tokens: torch.Tensor, patches: torch.Tensor, views: list[View]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the probes' cross-entropies, and each probe's accuracy on labelled places."""
    logits = {
        "digit": heads.digit(patches.float()),
        "color": heads.color(tokens.float()),
        "shape": heads.shape(tokens.float()),
        "code": heads.code(tokens.float()).view(-1, 10),
    }
    total, accuracy = tokens.new_zeros(()).float(), {}
    for name, value in logits.items():
        labels = torch.cat([getattr(view, name) for view in views]).reshape(-1)
        count = (labels != IGNORE).sum()
        if count == 0:
            continue
        skip = EMPTY.get(name, IGNORE)
        weight = value.new_ones(value.shape[-1])
        if name in EMPTY:
            weight[skip] = EMPTY_WEIGHT
        total = total + cross_entropy(value, labels, weight=weight, ignore_index=IGNORE)
        seen = (labels != IGNORE) & (labels != skip)
        hit = (value.argmax(-1) == labels)[seen]
        accuracy[name] = hit.float().mean().item() if len(hit) else float("nan")
    return total, accuracy
