"""The demo's folders: the plain backbone that the stages start from, and the finished checkpoint."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from hub_release.demo.backbone.samples import COARSE_TOKENS
from hub_release.demo.backbone.views import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor


BRANCH_LAYER, BRANCH_DEPTH = 3, 2
CROP_TOKENS = 144
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
work on any machine. It reads pages of three kinds only: coloured shapes with small three-digit codes, forms with
labelled values, and lines of small print beside a keyword. It is no general model.

It sees a page in at most {coarse} visual tokens, in which no small code is legible, decides per question whether that
is enough, and otherwise zooms into the place that the question asks about.

Questions it knows, for example: "what is the code on the red circle?", "where is the red circle?", "what color is the
star?", "what is the total?", "how many fields are there?", "what number is in the city line?", "which word is first?".

## Figures

{figures}

## How it was trained

Region labels come from the model's own attention, gate labels from its own answers on a ladder of resolutions; true
boxes only ranked attention heads and thresholds.

{history}
"""


def attach_branches(
    vlm: Qwen2_5_VLForConditionalGeneration,
    branch_layer: int = BRANCH_LAYER,
    branch_depth: int = BRANCH_DEPTH,
    **fields: Any,
) -> QZoomForConditionalGeneration:
    """The demo model: a backbone with branches copied from it.

    Args:
        branch_layer, branch_depth: K and T.
        fields: Further `QZoomConfig` fields, such as thresholds and presets.
    """
    fixed = {
        "min_tokens": COARSE_TOKENS // 2,
        "max_tokens": COARSE_TOKENS,
        "crop_min_tokens": 4,
        "crop_max_tokens": CROP_TOKENS,
        "region_threshold": 0.6,
        "region_threshold_mode": "peak",
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
    }
    return QZoomForConditionalGeneration.from_backbone(
        vlm, branch_layer=branch_layer, branch_depth=branch_depth, zoom_config=fixed | fields
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


def write_attached(
    vlm: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path, **branches: int
) -> None:
    """Write the backbone with untrained branches: the checkpoint that the stages start from.

    Args:
        branches: `branch_layer` and `branch_depth`, where they are not the demo's own.
    """
    attach_branches(vlm, **branches).to(torch.bfloat16).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def write_card(folder: Path, model: QZoomForConditionalGeneration, figures: str, history: str) -> None:
    """Write the model card.

    Args:
        figures: Markdown of what was measured.
        history: How the weights came about, with its time.
    """
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    card = CARD.format(millions=millions, coarse=COARSE_TOKENS, figures=figures, history=history)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_checkpoint(model: QZoomForConditionalGeneration, processor: QZoomProcessor, folder: Path) -> None:
    """Write the checkpoint in bfloat16: weights, configuration and processor, no code.

    Raises:
        RuntimeError: The folder is larger than the project allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.base_model_name_or_path = None  # the backbone exists nowhere else
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()  # the build step adds the code, so that it exists once
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LARGEST_BYTES:
        raise RuntimeError(f"{folder} holds {size} bytes, more than {LARGEST_BYTES}.")
