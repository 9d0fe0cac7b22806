"""The demo's folders: the backbone with untrained branches that the stages start from, and the finished checkpoint."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from hub_release.card.card import HISTORY
from hub_release.card.parts import compose, read_card
from hub_release.demo.backbone.model import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH, TEMPORAL_PATCH, TOKEN
from hub_release.demo.backbone.samples import COARSE_TOKENS
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor


# K and T
BRANCH_LAYER, BRANCH_DEPTH = 3, 2
CROP_TOKENS = 144
LARGEST_BYTES = 8_000_000

# what the demo's author says; what the files say is added by build.py
CARD = Path(__file__).with_name("card.md")


def attach_branches(
    vlm: Qwen2_5_VLForConditionalGeneration,
    branch_layer: int = BRANCH_LAYER,
    branch_depth: int = BRANCH_DEPTH,
    **fields: Any,
) -> QZoomForConditionalGeneration:
    """The demo model: a backbone with branches copied from it.

    Args:
        branch_layer, branch_depth: K and T.
        fields: further `QZoomConfig` fields, such as thresholds and presets.
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
        "gate_branch": "full",
        "region_branch": "full",
        "keep_share": 1.0,  # until the finished branches are made light
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
        "temporal_patch_size": TEMPORAL_PATCH,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
        "size": {"shortest_edge": 4 * TOKEN**2, "longest_edge": 1024 * TOKEN**2},
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
    """Writes the backbone with untrained branches: the checkpoint that the stages start from.

    Args:
        branches: `branch_layer` and `branch_depth`, where they are not the demo's own.
    """
    attach_branches(vlm, **branches).to(torch.bfloat16).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def write_card(folder: Path, history: str) -> None:
    """Writes the author's part of the model card.

    Args:
        history: how long the weights took to train, and on what.
    """
    card = read_card(CARD.read_text(encoding="utf-8"))
    card.sections[HISTORY] += f"\n\n{history}"
    (folder / "README.md").write_text(compose(card), encoding="utf-8")


def write_checkpoint(model: QZoomForConditionalGeneration, processor: QZoomProcessor, folder: Path) -> None:
    """Writes the checkpoint in bfloat16: weights, configuration and processor, no code.

    Raises:
        RuntimeError: the folder is larger than the project allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.base_model_name_or_path = None  # the backbone exists nowhere else
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()  # the build step adds the code, so that it exists once
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST_BYTES:
        raise RuntimeError(f"{folder} holds {size} bytes, more than {LARGEST_BYTES}.")
