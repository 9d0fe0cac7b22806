"""Stages that make the demo's backbone: dense tower pretraining, then the decoder's curriculum."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from hub_release.demo.backbone.dense_heads import DenseHeads, dense_loss, label_words
from hub_release.demo.backbone.fast_tower import fast_tower
from hub_release.demo.backbone.loop import fit
from hub_release.demo.backbone.packing import Batch, answer_loss
from hub_release.demo.backbone.samples import DecoderSteps, TowerSteps
from hub_release.demo.backbone.view_batch import ViewBatch, encode
from modeling_qzoom.training_losses_qzoom import IGNORED


# weight of the dense labels beside the answers: keeps the tower reading while the decoder learns
DENSE_WEIGHT = 0.15


@dataclass(frozen=True)
class DecoderStage:
    """One stage of the decoder's curriculum; pages of all kinds are drawn in every stage.

    Attributes:
        name: name of its file in the work folder.
        steps: number of batches.
        groups: samples per step by name, see `samples.DRAW`.
        decay: share of the steps with a falling rate.
        lr: peak rate.
    """

    name: str
    steps: int
    groups: dict[str, int]
    decay: float
    lr: float = 2e-3


def training_parts(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> nn.ModuleDict:
    """What the stages train and store: the model without its tied head, and the dense probes."""
    vision = model.config.vision_config
    heads = DenseHeads(vision.hidden_size, vision.out_hidden_size, label_words(tokenizer))
    return nn.ModuleDict({"model": model.model, "heads": heads})


def build_optimizers(module: nn.Module, lr: float, tower_share: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, probes, norms and biases.

    Args:
        lr: peak rate.
        tower_share: share of the rate that the vision tower gets.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            hidden = weight.ndim == 2 and "embed" not in name and "heads." not in name
            kind = "matrices" if hidden else "pixels" if weight.ndim > 2 else "others"
            groups.setdefault((kind, "visual." in name), []).append(weight)

    def entries(kinds: tuple[str, ...]) -> list[dict[str, Any]]:
        entries = []
        for (kind, in_tower), weights in groups.items():
            if kind in kinds:
                # 1176 correlated pixels enter each patch feature: at the others' rate its mean jumps at every step
                share = (tower_share if in_tower else 1.0) * (0.125 if kind == "pixels" else 1.0)
                entries.append({"params": weights, "lr": lr * share})
        return entries

    return [
        torch.optim.Muon(entries(("matrices",)), momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(entries(("others", "pixels")), betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_tower(
    parts: nn.ModuleDict, steps: int, path: Path, views: int = 48, lr: float = 2e-3, seed: int = 1
) -> None:
    """Trains the vision tower on dense labels (and the embeddings that name what it sees), large digits first.

    Args:
        views: views per step.
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
        hit: (places,) as `answer_loss` returns it.
    """
    rows, width = len(batch.kinds), max(len(kinds) for kinds in batch.kinds) + 1
    number = torch.arange(rows, device=hit.device)[:, None] * width + batch.segment
    missed = torch.bincount(number[batch.labels != IGNORED], weights=(~hit).float(), minlength=rows * width).tolist()
    right: dict[str, list[bool]] = {}
    for row, kinds in enumerate(batch.kinds):
        for place, kind in enumerate(kinds, start=1):
            right.setdefault(kind, []).append(missed[row * width + place] == 0)
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def decoder_step(
    model: Qwen2_5_VLForConditionalGeneration, heads: DenseHeads, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, and the share of right answers of each kind; the tower has to be under `fast_tower`."""
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
    stage: DecoderStage,
    path: Path,
    seed: int = 2,
) -> None:
    """Teaches the decoder to search and read: one stage of its curriculum.

    Args:
        parts: what is trained and left at `path`, see `training_parts`.
        seed: seed of the drawn pages.
    """

    def step_loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return decoder_step(model, cast(DenseHeads, parts["heads"]), batch)

    optimizers = build_optimizers(parts, stage.lr, tower_share=0.4)
    steps = DecoderSteps(tokenizer, stage.groups, seed, stage.steps)
    with fast_tower(model.model.visual):
        fit(parts, optimizers, steps, step_loss, path, decay=stage.decay)
