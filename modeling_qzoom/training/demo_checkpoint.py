"""Puts backbone, branches, tokenizer and options together into the demo checkpoint's folder, which holds data only."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from .. import QZoomForConditionalGeneration, QZoomProcessor
from .demo_data import COARSE_TOKENS
from .views import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH


BRANCH_LAYER, BRANCH_DEPTH = 3, 2
CROP_TOKENS = {"fast": 64, "balanced": 144, "accurate": 196}
LARGEST_BYTES = 8_000_000

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [q-zoom, demo]
---

# Q-Zoom demo

A vision-language model of {millions:.1f} million weights, trained from scratch on drawn pages, that shows Q-Zoom at
work on any machine. It reads pages of one kind only: coloured shapes with small three-digit codes. It is no general
model.

It sees a page in at most {coarse} visual tokens, in which no code is legible, decides per question whether that is
enough, and otherwise zooms into the place that the question asks about. Region labels come from the model's own
attention, gate labels from its own answers; true boxes ranked the attention heads, chose thresholds and placed the
crops that gate labels were made with.

Questions it knows: "what is the code on the red circle?", "which number is on the red circle?", "read the red
circle.", "what color is the star?", "what shape is blue?", "how many shapes are there?".

## Figures

{figures}

Trained from nothing on one CPU core in about 100 minutes, with the stages of `hub_release/train_demo.py`, restarted by
hand while the recipe was tuned.
"""


def attach_branches(vlm: Qwen2_5_VLForConditionalGeneration, **fields: Any) -> QZoomForConditionalGeneration:
    """The demo model: a backbone with branches copied from it.

    Args:
        fields: Further `QZoomConfig` fields, such as thresholds and presets.
    """
    fixed = {
        "min_tokens": COARSE_TOKENS // 2,
        "max_tokens": COARSE_TOKENS,
        "crop_min_tokens": 4,
        "crop_max_tokens": CROP_TOKENS["balanced"],
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
    }
    return QZoomForConditionalGeneration.from_backbone(
        vlm, branch_layer=BRANCH_LAYER, branch_depth=BRANCH_DEPTH, zoom_config=fixed | fields
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> QZoomProcessor:
    """The demo's processor, at the coarse budget."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
        "size": {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": 1024 * (PATCH * MERGE) ** 2},
    }
    with tempfile.TemporaryDirectory() as folder:
        # the class behind the name depends on what is installed, which only the Auto class knows
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
        image_processor = AutoImageProcessor.from_pretrained(folder)
    return QZoomProcessor(
        image_processor, tokenizer, min_tokens=COARSE_TOKENS // 2, max_tokens=COARSE_TOKENS, max_source_pixels=10**8
    )


def figure_table(measured: dict[str, Any]) -> str:
    """Figures and their conditions, as `python -m modeling_qzoom.evaluation --json` wrote them, in Markdown."""
    lines = ["| figure | value |", "|---|---|"]
    for name, value in measured["summary"].items():
        lines.append(f"| {name} | {value:.3f} |")
    conditions = ", ".join(f"{name} {value}" for name, value in measured["conditions"].items() if name != "command")
    return "\n".join(lines) + f"\n\n`{measured['conditions']['command']}`: {conditions}."


def write_card(folder: Path, model: QZoomForConditionalGeneration, measured: dict[str, Any] | None) -> None:
    """Write the model card; without figures it says so."""
    figures = figure_table(measured) if measured else "Not measured yet."
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    card = CARD.format(millions=millions, coarse=COARSE_TOKENS, figures=figures)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_checkpoint(
    model: QZoomForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    measured: dict[str, Any] | None,
) -> None:
    """Write the checkpoint in bfloat16: weights, configuration, processor and card, no code.

    Raises:
        RuntimeError: The folder is larger than the project allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()  # the build step adds the code, so that it exists once
    write_card(folder, model, measured)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LARGEST_BYTES:
        raise RuntimeError(f"{folder} holds {size} bytes, more than {LARGEST_BYTES}.")
