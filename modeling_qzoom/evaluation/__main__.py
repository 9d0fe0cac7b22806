"""Prints the demo figures of a checkpoint.

python -m modeling_qzoom.evaluation CHECKPOINT [--pages 500] [--json FILE]
"""

import argparse
import json
import logging
import platform
import sys
import time
from pathlib import Path

import torch
import transformers

from .. import QZoomForConditionalGeneration, QZoomProcessor
from ..options_qzoom import resolve_options
from .demo_figures import FIRST_SEED, measure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--effort", help="preset of the checkpoint")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32 or bfloat16")
    parser.add_argument("--json", type=Path, help="also write the figures and their conditions here")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model = QZoomForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=arguments.dtype)
    processor = QZoomProcessor.from_pretrained(arguments.checkpoint)
    options = {"effort": arguments.effort} if arguments.effort else {}
    began = time.monotonic()
    summary = measure(model, processor, arguments.first_seed, arguments.pages, options)
    # what was in force, presets included
    used = resolve_options(options, (model.generation_config,), model.config, mrope=True)
    conditions = {
        "command": " ".join(["python -m modeling_qzoom.evaluation", *sys.argv[1:]]),
        "pages": arguments.pages,
        "first_seed": arguments.first_seed,
        "coarse_budget": [processor.min_tokens, processor.max_tokens],
        "crop_budget": [used.crop_min_tokens, used.crop_max_tokens],
        "gate_threshold": used.gate_threshold,
        "region_threshold": [used.region_threshold, used.region_threshold_mode],
        "effort": arguments.effort,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.vlm.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads",
        "seconds": round(time.monotonic() - began),
    }
    for name, value in {**summary, **conditions}.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "conditions": conditions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
