"""Dense labels for the demo's vision tower: digit, colour, shape, word and code under each patch and token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

from ..evaluation.pages import CODE_LENGTH, COLORS, SHAPES, WORDS
from .views import IGNORE, NO_DIGIT, NO_OBJECT, NO_WORD, View, normalise


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


class FlatPatchEmbed(Qwen2_5_VisionPatchEmbed):
    """The tower's patch embedding as one matrix product, with the same weights.

    On a CPU the backward pass of the convolution takes more time than all the rest of a training step. An image has
    two equal temporal copies, so their weights are added and one copy is enough.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(n, 3 * 14 * 14) → (n, d)."""
        return linear(hidden_states, self.proj.weight.sum(2).flatten(1))


@contextmanager
def flat_patches(tower: nn.Module) -> Iterator[None]:
    """Within it the tower takes one temporal copy of its patches and trains much faster."""
    usual = type(tower.patch_embed)
    tower.patch_embed.__class__ = FlatPatchEmbed
    try:
        yield
    finally:
        tower.patch_embed.__class__ = usual


@dataclass
class ViewBatch:
    """What the tower needs of several views, as few tensors that travel cheaply between processes.

    Args:
        patches: (4 * tokens, 588) uint8.
        grids: (views, 3), t, h, w in patches.
        labels: Dense labels by name, as in `View`, of all views one after the other.
    """

    patches: Tensor
    grids: Tensor
    labels: dict[str, Tensor]


def stack_views(views: list[View]) -> ViewBatch:
    """Views in the order of their image tokens."""
    return ViewBatch(
        torch.cat([view.patches for view in views]),
        torch.tensor([[1, 2 * view.grid[0], 2 * view.grid[1]] for view in views]),
        {name: torch.cat([getattr(view, name) for view in views]) for name in (*EMPTY, "code")},
    )


def encode(tower: nn.Module, views: ViewBatch) -> tuple[Tensor, Tensor]:
    """Merged tokens (tokens, D) in reading order, and patch features (4 * tokens, d) in the processor's order.

    The tower has to be under `flat_patches`.
    """
    out = tower(normalise(views.patches), views.grids)
    return out.pooler_output, out.last_hidden_state


def dense_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Sum of the probes' cross-entropies, and each probe's accuracy on labelled places."""
    total, accuracy = torch.zeros(()), {}
    for name, value in logits.items():
        wanted = labels[name].reshape(-1)
        if (wanted == IGNORE).all():
            continue
        skip = EMPTY.get(name, IGNORE)
        weight = value.new_ones(value.shape[-1])
        if name in EMPTY:
            weight[skip] = EMPTY_WEIGHT
        total = total + cross_entropy(value, wanted, weight=weight, ignore_index=IGNORE)
        seen = (wanted != IGNORE) & (wanted != skip)
        hit = (value.argmax(-1) == wanted)[seen]
        accuracy[name] = hit.float().mean().item() if len(hit) else float("nan")
    return total, accuracy
