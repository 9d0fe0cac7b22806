"""From nothing to the demo checkpoint: `python hub_release/train_demo.py`.

Stages leave their weights in the work folder and are skipped when these exist, so an interrupted run resumes.
"""

import argparse
import json
import logging
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_qzoom import QZoomForConditionalGeneration  # noqa: E402
from modeling_qzoom.evaluation.synthetic import question_corpus  # noqa: E402
from modeling_qzoom.training.branches import balance, train_branch  # noqa: E402
from modeling_qzoom.training.demo_backbone import train_decoder, train_tower, training_parts  # noqa: E402
from modeling_qzoom.training.demo_checkpoint import (  # noqa: E402
    CROP_TOKENS,
    attach_branches,
    build_processor,
    write_card,
    write_checkpoint,
)
from modeling_qzoom.training.demo_labels import LEGIBLE_PAGES, choose_heads, gate_rows, region_rows  # noqa: E402
from modeling_qzoom.training.demo_model import build_backbone, demo_config  # noqa: E402
from modeling_qzoom.training.demo_options import choose_options  # noqa: E402
from modeling_qzoom.training.loop import load_state  # noqa: E402
from modeling_qzoom.training.packing import Packer  # noqa: E402
from modeling_qzoom.training.region_labels import TriStateRule  # noqa: E402
from modeling_qzoom.training.tokenization import SPECIAL_TOKENS, build_tokenizer  # noqa: E402


@dataclass(frozen=True)
class DecoderStage:
    """One stage of the decoder's curriculum.

    Args:
        name: Its file in the work folder.
        groups: Samples per step: small views, whole legible pages, views to search in, coarse pages with crops, whole
            pages in many tokens.
        decay: Share of the steps with a falling rate.
        lr: Peak rate.
    """

    name: str
    steps: int
    groups: tuple[int, int, int, int, int]
    decay: float
    lr: float = 2e-3


TOWER_STEPS = 720
DECODER_STAGES = (
    DecoderStage("2-read", 400, (14, 16, 0, 0, 0), decay=0.0),
    DecoderStage("3-pages", 200, (8, 6, 0, 10, 0), decay=0.0),
    DecoderStage("4-polish", 600, (6, 0, 11, 7, 0), decay=0.7),
    DecoderStage("5-large", 240, (6, 0, 5, 9, 2), decay=1.0, lr=1e-3),
)
LABEL_TOKENS = 144
"""Budget of the view in which the backbone's attention is read: it searches best where it can see."""
LEGIBLE_TOKENS = 196
"""Budget at which pages with larger codes are legible, so that wrong answers can be left out."""
LABEL_RULE = TriStateRule(foreground=0.4, background=0.25, growth=0, largest_box=0.25)
"""A cell is an eighth of the page here, not a twenty-fourth: no growth, and little is left undecided."""

logger = logging.getLogger("train_demo")


def fresh_backbone() -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """The untrained backbone and its tokenizer."""
    tokenizer = build_tokenizer(question_corpus())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    # a vocabulary of a multiple of 64, like every other width
    return build_backbone(demo_config(-(-len(tokenizer) // 64) * 64, ids)), tokenizer


def train_backbone(work: Path, scale: float) -> None:
    """Run the backbone's stages that have not left their weights yet.

    Args:
        scale: Factor on every stage's number of steps.
    """
    model, tokenizer = fresh_backbone()
    parts = training_parts(model)
    paths = [work / "1-tower.safetensors", *(work / f"{stage.name}.safetensors" for stage in DECODER_STAGES)]
    newest = max((index for index, path in enumerate(paths) if path.exists()), default=-1)
    if newest == 0:
        load_tower(parts, paths[0])
    elif newest > 0:
        load_state(parts, paths[newest])
    for index in range(newest + 1, len(paths)):
        logger.info("stage %s", paths[index].stem)
        if index == 0:
            train_tower(parts, round(TOWER_STEPS * scale), paths[0])
            continue
        stage = DECODER_STAGES[index - 1]
        steps = round(stage.steps * scale)
        train_decoder(model, parts, tokenizer, steps, paths[index], stage.groups, stage.decay, stage.lr, seed=index)


def load_tower(parts: torch.nn.ModuleDict, path: Path) -> None:
    """Read the tower stage's weights, which are the tower and its probes only."""
    load_state(torch.nn.ModuleDict({"visual": parts["model"].visual, "heads": parts["heads"]}), path)


def train_branches(work: Path, steps: tuple[int, int], pages: tuple[int, int]) -> tuple[Any, PreTrainedTokenizerFast]:
    """Label with the trained backbone, then train region and gate branch; returns the model and its tokenizer.

    Args:
        steps: Steps of the region and of the gate branch.
        pages: Pages that are labelled for them.
    """
    vlm, tokenizer = fresh_backbone()
    load_state(training_parts(vlm), work / f"{DECODER_STAGES[-1].name}.safetensors")
    vlm.eval().requires_grad_(False)
    packer = Packer(tokenizer)
    model = attach_branches(vlm)
    for place, branch in enumerate(("region", "gate")):
        path = work / f"{6 + place}-{branch}.safetensors"
        if not path.exists():
            if branch == "region":
                heads = choose_heads(vlm, packer, LABEL_TOKENS)
                rows = region_rows(vlm, packer, heads, pages[0], LABEL_TOKENS, LABEL_RULE)
                legible = {"settings": LEGIBLE_PAGES, "only_right": True, "seed": 14}
                rows += region_rows(vlm, packer, heads, pages[0], LEGIBLE_TOKENS, LABEL_RULE, **legible)
            else:
                rows = balance(gate_rows(vlm, packer, pages[1], CROP_TOKENS["balanced"]), random.Random(0))
            train_branch(model, tokenizer, rows, branch, steps[place], path)
        load_state(getattr(model.zoom, branch), path)
    return model, tokenizer


def finish(model: QZoomForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path, pages: int) -> None:
    """Choose the options as the stored precision behaves, write the checkpoint, measure it and add its card."""
    write_checkpoint(model, tokenizer, folder, None)
    model = QZoomForConditionalGeneration.from_pretrained(folder)
    for name, value in choose_options(model, build_processor(tokenizer)).items():
        setattr(model.config, name, value)
    write_checkpoint(model, tokenizer, folder, None)
    figures = folder.parent / "qzoom-demo-figures.json"
    # relative to the repository, so that the command in the card works in any clone
    shown = [str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path) for path in (folder, figures)]
    command = [sys.executable, "-m", "modeling_qzoom.evaluation", shown[0], "--pages", str(pages), "--json", shown[1]]
    subprocess.run(command, cwd=ROOT, check=True)
    write_card(folder, model, json.loads(figures.read_text()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "demo-stages", help="folder of the stages' weights"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the backbone stages' numbers of steps")
    parser.add_argument(
        "--branch-steps", type=int, nargs=2, default=(300, 120), help="steps of region and gate branch"
    )
    parser.add_argument("--label-pages", type=int, nargs=2, default=(500, 480), help="pages labelled for each of them")
    parser.add_argument("--output", type=Path, default=ROOT / "hub_release" / "checkpoints" / "qzoom-demo")
    parser.add_argument(
        "--pages", type=int, default=500, help="fresh pages that the published figures are measured on"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train_backbone(arguments.work, arguments.scale)
    model, tokenizer = train_branches(arguments.work, tuple(arguments.branch_steps), tuple(arguments.label_pages))
    finish(model, tokenizer, arguments.output.resolve(), arguments.pages)


if __name__ == "__main__":
    main()
