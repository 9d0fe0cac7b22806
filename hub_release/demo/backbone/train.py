"""Stages that make the demo's backbone: dense tower pretraining, then the decoder's curriculum."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from hub_release.demo.backbone.dense_labels import DenseHeads, ViewBatch, dense_loss, encode, label_words
from hub_release.demo.backbone.fast_tower import fast_tower
from hub_release.demo.backbone.loop import fit
from hub_release.demo.backbone.model import build_optimizers
from hub_release.demo.backbone.packing import Batch, answer_loss
from hub_release.demo.backbone.samples import ALL_KINDS, DecoderSteps, TowerSteps, Weights
from hub_release.demo.backbone.views import IGNORE


DENSE_WEIGHT = 0.15
"""Weight of the dense labels beside the answers: keeps the tower reading while the decoder learns."""


def training_parts(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> nn.ModuleDict:
    """What the stages train and store: the model without its tied head, and the dense probes."""
    vision = model.config.vision_config
    heads = DenseHeads(vision.hidden_size, vision.out_hidden_size, label_words(tokenizer))
    return nn.ModuleDict({"model": model.model, "heads": heads})


def train_tower(
    parts: nn.ModuleDict, steps: int, path: Path, views: int = 48, lr: float = 2e-3, seed: int = 1
) -> None:
    """Dense pretraining of the vision tower (and of the embeddings that name what it sees), large digits first.

    Args:
        views: Views per step.
    """
    model: Any = parts["model"]
    heads = parts["heads"]
    embedding = model.get_input_embeddings()
    model.language_model.layers.requires_grad_(False)
    model.language_model.norm.requires_grad_(False)

    def step_loss(drawn: ViewBatch) -> tuple[Tensor, dict[str, float]]:
        drawn = drawn.to(embedding.weight.device)
        with torch.autocast(embedding.weight.device.type, torch.bfloat16):
            tokens, patches = encode(model.visual, drawn)
        return dense_loss(heads(tokens, patches, embedding.weight), drawn.labels)

    with fast_tower(model.visual):
        fit(parts, build_optimizers(parts, lr), TowerSteps(seed, steps, views), step_loss, path)
    parts.requires_grad_(True)


def right_shares(batch: Batch, hit: Tensor) -> dict[str, float]:
    """Per kind of segment ("page/fine+crop", say) the share whose whole answer is right.

    Args:
        hit: (places,) of `answer_loss`.
    """
    rows, width = len(batch.kinds), max(len(kinds) for kinds in batch.kinds) + 1
    number = torch.arange(rows, device=hit.device)[:, None] * width + batch.segment
    missed = torch.bincount(number[batch.labels != IGNORE], weights=(~hit).float(), minlength=rows * width).tolist()
    found: dict[str, list[bool]] = {}
    for row, kinds in enumerate(batch.kinds):
        for place, kind in enumerate(kinds, start=1):
            found.setdefault(kind, []).append(missed[row * width + place] == 0)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def decoder_step(
    model: Qwen2_5_VLForConditionalGeneration, heads: DenseHeads, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, and the share of right answers per kind. The tower has to be under `fast_tower`."""
    embedding = model.get_input_embeddings().weight
    batch = batch.to(embedding.device)
    with torch.autocast(embedding.device.type, torch.bfloat16):
        tokens, patches = encode(model.model.visual, batch.views)
        loss, hit = answer_loss(model, batch, tokens)
    dense, accuracy = dense_loss(heads(tokens, patches, embedding), batch.views.labels)
    measures = {"tower-" + name: value for name, value in accuracy.items() if name in ("digit", "word")}
    return loss + DENSE_WEIGHT * dense, measures | right_shares(batch, hit)


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

    def step_loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return decoder_step(model, cast(DenseHeads, parts["heads"]), batch)

    optimizers = build_optimizers(parts, lr, tower_share=0.4)
    with fast_tower(model.model.visual):
        fit(parts, optimizers, DecoderSteps(tokenizer, groups, seed, steps, kinds), step_loss, path, decay=decay)
