"""Dense heads: probes that tell from the vision tower's features what is drawn under each patch and token."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedTokenizerFast

from hub_release.demo.backbone.dense_labels import NOTHING
from modeling_qzoom.data.drawn.pages import CODE_LENGTH, COLORS, SHAPES, WORDS
from modeling_qzoom.training_losses_qzoom import IGNORED


# most places are empty: at full weight "nothing here" drowns what the tower has to learn
NOTHING_WEIGHT = 0.15


class DenseHeads(nn.Module):
    """Probes on the vision tower, thrown away after training.

    Colours, shapes and label words are told by the decoder's own embeddings of these words, as a captioner would be
    trained: so a question's words and what they name come to lie close together, and searching is soon learned.

    Args:
        patch_size: width of the patch features.
        token_size: width of the merged tokens and of the embeddings.
        words: token ids of the words of each sort of label, (words, spellings).
    """

    def __init__(self, patch_size: int, token_size: int, words: dict[str, list[list[int]]]) -> None:
        super().__init__()
        self.digit = nn.Linear(patch_size, NOTHING["digit"] + 1)
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
    words = {}
    for name, labels in {"color": COLORS, "shape": SHAPES, "word": WORDS}.items():
        words[name] = [tokenizer.encode(" " + label)[:1] + tokenizer.encode(label)[:1] for label in labels]
    return words


def dense_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Sum of the probes' cross-entropies, and each probe's accuracy on labelled places (not a number without any)."""
    total, accuracy = next(iter(logits.values())).new_zeros(()), {}
    for name, value in logits.items():
        target = labels[name].reshape(-1)
        skip = NOTHING.get(name, IGNORED)
        weight = value.new_ones(value.shape[-1])
        if name in NOTHING:
            weight[skip] = NOTHING_WEIGHT
        share = weight[target.clamp(min=0)].masked_fill(target == IGNORED, 0).sum()
        loss = cross_entropy(value, target, weight=weight, ignore_index=IGNORED, reduction="sum")
        total = total + loss / share.clamp(min=NOTHING_WEIGHT)  # nothing is labelled: zero, not 0 / 0
        seen = (target != IGNORED) & (target != skip)
        accuracy[name] = ((value.argmax(-1) == target) & seen).sum() / seen.sum()
    # one transfer for all of them: a GPU waits for each
    return total, dict(zip(accuracy, torch.stack(list(accuracy.values())).tolist(), strict=True))
