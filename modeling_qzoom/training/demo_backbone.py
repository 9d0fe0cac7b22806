"""Stages that make the demo's backbone: dense tower pretraining, then the decoder's curriculum."""

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from .demo_data import crop_sample, fused_sample, large_sample, search_sample, tower_views, whole_sample
from .demo_model import build_optimizers
from .loop import fit
from .packing import Batch, Packer, Sample, answer_loss
from .tower import DenseHeads, dense_loss, encode
from .views import IGNORE


DENSE_WEIGHT = 0.15
"""Weight of the dense labels beside the answers: keeps the tower reading while the decoder learns."""


def training_parts(model: Qwen2_5_VLForConditionalGeneration) -> nn.ModuleDict:
    """What the stages train and store: the model without its tied head, and the dense probes."""
    vision = model.config.vision_config
    return nn.ModuleDict({"model": model.model, "heads": DenseHeads(vision.hidden_size, vision.out_hidden_size)})


def train_tower(parts: nn.ModuleDict, steps: int, path: Path, lr: float = 2e-3, seed: int = 1) -> None:
    """Dense pretraining of the vision tower, large digits first."""
    rng = random.Random(seed)
    module = nn.ModuleDict({"visual": parts["model"].visual, "heads": parts["heads"]})

    def step_loss(done: float) -> tuple[Tensor, dict[str, float]]:
        views = tower_views(rng, 48, (18 if done < 0.2 else 9, 28))
        with torch.autocast("cpu", torch.bfloat16):
            tokens, patches = encode(module["visual"], views)
        return dense_loss(module["heads"], tokens, patches, views)

    fit(module, build_optimizers(module, lr), step_loss, steps, path)


def segment_hits(batch: Batch, samples: list[Sample], hit: Tensor) -> list[tuple[str, bool]]:
    """Per segment its kind ("fine", "coarse", with "+crop" where it has one) and whether the whole answer is right."""
    right = torch.ones_like(batch.labels, dtype=torch.bool)
    right[batch.labels != IGNORE] = hit
    found = []
    for row, sample in enumerate(samples):
        for number, part in enumerate(sample.segments, start=1):
            kind = part.question.kind + ("+crop" if part.crop is not None else "")
            found.append((kind, bool(right[row][batch.segment[row] == number].all())))
    return found


def decoder_step(
    model: Qwen2_5_VLForConditionalGeneration, heads: DenseHeads, packer: Packer, samples: list[Sample]
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one group of samples, and the share of right answers per kind."""
    batch = packer(samples)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, patches = encode(model.model.visual, batch.views)
        loss, hit = answer_loss(model, batch, tokens)
    dense, accuracy = dense_loss(heads, tokens, patches, batch.views)
    found = segment_hits(batch, samples, hit)
    measures = {"tower-" + name: value for name, value in accuracy.items() if name in ("digit", "code")}
    measures["loss"] = loss.item()
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
    groups: tuple[int, int, int, int, int],
    decay: float,
    lr: float = 2e-3,
    seed: int = 2,
) -> None:
    """Teach the decoder to search and read.

    Args:
        groups: Samples per step: small views, whole legible pages, views to search in, coarse
            pages with crops, whole pages in many tokens.
        decay: Share of the steps with a falling rate.
    """
    rng, packer = random.Random(seed), Packer(tokenizer)
    kinds = {
        "crop": crop_sample,
        "whole": whole_sample,
        "search": search_sample,
        "page": fused_sample,
        "large": large_sample,
    }

    def step_loss(done: float) -> tuple[Tensor, dict[str, float]]:
        total, measures = torch.zeros(()), {}
        # one batch per kind, since samples of a kind are of similar length and padding is wasted work
        for count, (name, draw) in zip(groups, kinds.items(), strict=True):
            if not count:
                continue
            loss, values = decoder_step(model, parts["heads"], packer, [draw(rng) for _ in range(count)])
            total = total + loss * count / sum(groups)
            measures |= {f"{name}/{key}": value for key, value in values.items()}
        return total, measures

    fit(parts, build_optimizers(parts, lr, tower_share=0.4), step_loss, steps, path, decay=decay)
