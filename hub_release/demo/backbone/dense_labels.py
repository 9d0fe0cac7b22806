"""Dense labels for the demo's vision tower: digit, colour, shape, word and code under each patch and token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedTokenizerFast
from transformers.vision_utils import get_vision_position_ids

from hub_release.demo.backbone.fast_tower import padded_slots, padded_width
from hub_release.demo.backbone.views import IGNORE, MERGE, NO_DIGIT, NO_OBJECT, NO_WORD, View, normalise
from modeling_qzoom.data.drawn.pages import CODE_LENGTH, COLORS, SHAPES, WORDS


EMPTY = {"digit": NO_DIGIT, "color": NO_OBJECT, "shape": NO_OBJECT, "word": NO_WORD}
EMPTY_WEIGHT = 0.15
"""Most places are empty: at full weight "nothing here" drowns what the tower has to learn."""


class DenseHeads(nn.Module):
    """Probes on the tower, thrown away after training.

    Colours, shapes and label words are told by the decoder's own embeddings of these words, as a captioner would be
    trained: so a question's words and what they name come to lie close together, and searching is soon learned.

    Args:
        patch_size: Width of the patch features.
        token_size: Width of the merged tokens and of the embeddings.
        words: Per sort of label the token ids of its words, (words, spellings).
    """

    def __init__(self, patch_size: int, token_size: int, words: dict[str, list[list[int]]]) -> None:
        super().__init__()
        self.digit = nn.Linear(patch_size, NO_DIGIT + 1)
        self.code = nn.Linear(token_size, 10 * CODE_LENGTH)
        self.words = words
        self.scale = nn.ParameterDict({name: nn.Parameter(torch.ones(())) for name in words})
        # one row more than there are words: nothing of the sort
        self.nothing = nn.ParameterDict({name: nn.Parameter(torch.zeros(token_size)) for name in words})
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(len(ids) + 1)) for name, ids in words.items()})

    def forward(self, tokens: Tensor, patches: Tensor, embedding: Tensor) -> dict[str, Tensor]:
        """Logits by name.

        Args:
            tokens: (tokens, D).
            patches: (4 * tokens, d).
            embedding: (vocabulary, D) of the decoder.
        """
        tokens, patches = tokens.float(), patches.float()
        logits = {"digit": self.digit(patches), "code": self.code(tokens).view(-1, 10)}
        for name, ids in self.words.items():
            rows = embedding[torch.tensor(ids)].float().mean(1)  # (words, D)
            rows = torch.cat([rows, self.nothing[name][None]])
            logits[name] = self.scale[name] * linear(tokens, rows) + self.bias[name]
        return logits


def label_words(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[list[int]]]:
    """Token ids of every label, in a sentence and alone; each spelling is one token."""
    found = {}
    for name, labels in {"color": COLORS, "shape": SHAPES, "word": WORDS}.items():
        found[name] = [tokenizer.encode(" " + label)[:1] + tokenizer.encode(label)[:1] for label in labels]
    return found


@dataclass
class ViewBatch:
    """What the tower needs of several views, as few tensors that travel cheaply between processes.

    Args:
        patches: (4 * tokens, 588) uint8.
        grids: (views, 3), t, h, w in patches; stays on the CPU.
        positions: (4 * tokens, 2) row and column of every patch.
        slots: (4 * tokens,) place of every patch where views are padded to a common width.
        labels: Dense labels by name, as in `View`, of all views one after the other.
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
        {name: torch.cat([getattr(view, name) for view in views]) for name in (*EMPTY, "code")},
    )


def encode(tower: nn.Module, views: ViewBatch) -> tuple[Tensor, Tensor]:
    """Merged tokens (tokens, D) in reading order, and patch features (4 * tokens, d) in the processor's order.

    The tower has to be under `fast_tower`.
    """
    out = tower(normalise(views.patches), views.grids, **views.layout())
    return out.pooler_output, out.last_hidden_state


def dense_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Sum of the probes' cross-entropies, and each probe's accuracy on labelled places, not a number
    where there are none."""
    total, accuracy = next(iter(logits.values())).new_zeros(()), {}
    for name, value in logits.items():
        wanted = labels[name].reshape(-1)
        skip = EMPTY.get(name, IGNORE)
        weight = value.new_ones(value.shape[-1])
        if name in EMPTY:
            weight[skip] = EMPTY_WEIGHT
        share = weight[wanted.clamp(min=0)].masked_fill(wanted == IGNORE, 0).sum()
        loss = cross_entropy(value, wanted, weight=weight, ignore_index=IGNORE, reduction="sum")
        total = total + loss / share.clamp(min=EMPTY_WEIGHT)  # nothing is labelled: zero, not 0 / 0
        seen = (wanted != IGNORE) & (wanted != skip)
        accuracy[name] = ((value.argmax(-1) == wanted) & seen).sum() / seen.sum()
    # one transfer for all of them: a GPU waits for each
    return total, dict(zip(accuracy, torch.stack(list(accuracy.values())).tolist(), strict=True))
