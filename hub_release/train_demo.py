"""From nothing to the demo checkpoint: `python hub_release/train_demo.py`.

Stages leave their weights in the work folder and are skipped when these exist, so an interrupted run resumes.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_qzoom.evaluation.synthetic import question_corpus  # noqa: E402
from modeling_qzoom.training.demo_backbone import train_decoder, train_tower, training_parts  # noqa: E402
from modeling_qzoom.training.demo_model import build_backbone, demo_config  # noqa: E402
from modeling_qzoom.training.loop import load_state  # noqa: E402
from modeling_qzoom.training.tokenization import SPECIAL_TOKENS, build_tokenizer  # noqa: E402


logger = logging.getLogger("train_demo")


def fresh_backbone() -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """The untrained backbone and its tokenizer."""
    tokenizer = build_tokenizer(question_corpus())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    # a vocabulary of a multiple of 64, like every other width
    return build_backbone(demo_config(-(-len(tokenizer) // 64) * 64, ids)), tokenizer


def train_backbone(work: Path, steps: tuple[int, int, int, int]) -> Path:
    """Run the backbone's stages: tower, single views, pages with crops, the same with a falling rate."""
    model, tokenizer = fresh_backbone()
    parts = training_parts(model)
    paths = [work / f"{name}.safetensors" for name in ("1-tower", "2-read", "3-pages", "4-polish")]
    newest = max((index for index, path in enumerate(paths) if path.exists()), default=-1)
    if newest == 0:
        load_tower(parts, paths[0])
    elif newest > 0:
        load_state(parts, paths[newest])
    for index in range(newest + 1, len(paths)):
        logger.info("stage %s", paths[index].stem)
        if index == 0:
            train_tower(parts, steps[0], paths[0])
        else:
            groups, decay = {1: ((24, 10, 0), 0.0), 2: ((8, 6, 10), 0.0), 3: ((6, 6, 12), 1.0)}[index]
            train_decoder(model, parts, tokenizer, steps[index], paths[index], groups, decay, seed=index)
    return paths[-1]


def load_tower(parts: torch.nn.ModuleDict, path: Path) -> None:
    """Read the tower stage's weights, which are the tower and its probes only."""
    load_state(torch.nn.ModuleDict({"visual": parts["model"].visual, "heads": parts["heads"]}), path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/demo_train/stages"), help="folder of the stages' weights"
    )
    parser.add_argument("--steps", type=int, nargs=4, default=(700, 500, 900, 600), help="steps of the four stages")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train_backbone(arguments.work, tuple(arguments.steps))


if __name__ == "__main__":
    main()
