"""Training of the region and gate branches through the model's own `forward`; the backbone stays as it is."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..evaluation.synthetic import Question
from .loop import fit
from .tower import batch_inputs
from .views import View


@dataclass
class BranchRow:
    """One prompt with what a branch has to say about it.

    Args:
        view: The page at the coarse budget.
        question: What is asked.
        region: (h, w) labels in {1, 0, -100} on the view's grid, or None.
        gate: 1 where the coarse view is not enough, 0 where it is, None where unknown.
    """

    view: View
    question: Question
    region: Tensor | None = None
    gate: int | None = None


def prompt_inputs(rows: list[BranchRow], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Model inputs of plain prompts, padded on the left."""
    texts = []
    for row in rows:
        pads = "<|image_pad|>" * (row.view.grid[0] * row.view.grid[1])
        prompt = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{row.question.text}<|im_end|>\n"
        texts.append(prompt + "<|im_start|>assistant\n")
    encoded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    pixels, grids = batch_inputs([row.view for row in rows])
    image = encoded.input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {
        "input_ids": encoded.input_ids,
        "attention_mask": encoded.attention_mask,
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": image.long(),
    }


def balance(rows: list[BranchRow], rng: random.Random) -> list[BranchRow]:
    """Rows with a gate target, at most as many of the more frequent kind as of the rarer one."""
    kinds = [[row for row in rows if row.gate == kind] for kind in (0, 1)]
    count = min(map(len, kinds))
    if not count:
        raise ValueError("The gate needs rows that zoom and rows that do not; one kind is missing.")
    return [row for kind in kinds for row in rng.sample(kind, count)]


def train_branch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[BranchRow],
    branch: str,
    steps: int,
    path: Path,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 3,
) -> None:
    """Train one branch of a `QZoomForConditionalGeneration`.

    Args:
        rows: Rows that carry the branch's labels.
        branch: "region" or "gate".
        path: Where the branch's weights are left.
    """
    if branch not in ("region", "gate"):
        raise ValueError(f"branch must be 'region' or 'gate', not {branch!r}.")
    rng = random.Random(seed)
    model.requires_grad_(False)
    trained = getattr(model.zoom, branch)
    trained.requires_grad_(True)
    weights = [weight for weight in trained.parameters() if weight.requires_grad]

    def step_loss(done: float) -> tuple[Tensor, dict[str, float]]:
        chosen = rng.sample(rows, min(batch_size, len(rows)))
        if branch == "region":
            targets = {"region_targets": [row.region for row in chosen]}
        else:
            targets = {"gate_targets": torch.tensor([row.gate for row in chosen])}
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**prompt_inputs(chosen, tokenizer), **targets)
        return output.loss, {"loss": output.loss.item()}

    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    fit(trained, [optimizer], step_loss, steps, path, warm=max(1, min(50, steps // 10)))
