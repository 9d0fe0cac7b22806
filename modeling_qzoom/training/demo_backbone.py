"""Stages that make the demo's backbone: dense tower pretraining, then the decoder's curriculum."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from .demo_data import ALL_KINDS, DecoderSteps, StepBatch, TowerSteps, Weights
from .demo_model import build_optimizers
from .loop import fit
from .packing import Batch, answer_loss
from .tower import DenseHeads, ViewBatch, dense_loss, encode, flat_patches, label_words
from .views import IGNORE


DENSE_WEIGHT = 0.15
"""Weight of the dense labels beside the answers: keeps the tower reading while the decoder learns."""


def training_parts(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> nn.ModuleDict:
    """What the stages train and store: the model without its tied head, and the dense probes."""
    vision = model.config.vision_config
    heads = DenseHeads(vision.hidden_size, vision.out_hidden_size, label_words(tokenizer))
    return nn.ModuleDict({"model": model.model, "heads": heads})


def train_tower(parts: nn.ModuleDict, steps: int, path: Path, lr: float = 2e-3, seed: int = 1) -> None:
    """Dense pretraining of the vision tower (and of the embeddings that name what it sees), large digits first."""
    model, heads = parts["model"], parts["heads"]
    embedding = model.get_input_embeddings()
    model.language_model.layers.requires_grad_(False)
    model.language_model.norm.requires_grad_(False)

    def step_loss(views: ViewBatch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            tokens, patches = encode(model.visual, views)
        return dense_loss(heads(tokens, patches, embedding.weight), views.labels)

    with flat_patches(model.visual):
        fit(parts, build_optimizers(parts, lr), TowerSteps(seed, steps), step_loss, path)
    parts.requires_grad_(True)


def segment_hits(batch: Batch, hit: Tensor) -> list[tuple[str, bool]]:
    """Per segment its kind ("fine", "coarse", with "+crop" where it has one) and whether the whole answer is right."""
    right = torch.ones_like(batch.labels, dtype=torch.bool)
    right[batch.labels != IGNORE] = hit
    found = []
    for row, kinds in enumerate(batch.kinds):
        for number, kind in enumerate(kinds, start=1):
            found.append((kind, bool(right[row][batch.segment[row] == number].all())))
    return found


def decoder_step(
    model: Qwen2_5_VLForConditionalGeneration, heads: DenseHeads, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, and the share of right answers per kind. The tower has to be under `flat_patches`."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens, patches = encode(model.model.visual, batch.views)
        loss, hit = answer_loss(model, batch, tokens)
    embedding = model.get_input_embeddings().weight
    dense, accuracy = dense_loss(heads(tokens, patches, embedding), batch.views.labels)
    found = segment_hits(batch, hit)
    measures = {"tower-" + name: value for name, value in accuracy.items() if name in ("digit", "word")}
    for kind in {kind for kind, _ in found}:
        values = [right for other, right in found if other == kind]
        measures[kind] = sum(values) / len(values)
    return loss + DENSE_WEIGHT * dense, measures


def train_decoder(
    model: Qwen2_5_VLForConditionalGeneration,
    parts: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    path: Path,
    groups: dict[str, int],
    decay: float,
    lr: float = 2e-3,
    seed: int = 2,
    kinds: Weights = ALL_KINDS,
) -> None:
    """Teach the decoder to search and read.

    Args:
        groups: Samples per step by name, see `demo_data.DRAW`.
        kinds: How often each kind of page is drawn.
        decay: Share of the steps with a falling rate.
    """

    def step_loss(batches: list[StepBatch]) -> tuple[Tensor, dict[str, float]]:
        total, measures = torch.zeros(()), {}
        for part in batches:
            loss, values = decoder_step(model, parts["heads"], part.batch)
            total = total + loss * part.count / sum(groups.values())
            measures |= {f"{part.name}/{key}": value for key, value in values.items()}
        return total, measures

    optimizers = build_optimizers(parts, lr, tower_share=0.4)
    with flat_patches(model.model.visual):
        fit(parts, optimizers, DecoderSteps(tokenizer, groups, seed, steps, kinds), step_loss, path, decay=decay)
