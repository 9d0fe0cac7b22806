"""What a model's memory holds, computed from its shapes: `python -m hub_release.measure.memory`.

Weights of Qwen2.5-VL-3B and -7B and Qwen3-VL-4B, plain and with Q-Zoom, in bf16, int8 and nf4, and their KV cache.
Nothing is downloaded and no weight is made: the models stand on the meta device, and the quantizer of transformers
itself decides there which layers it takes. `--measure` builds the same models with random weights on a CUDA device and
sets what they really take beside it, together with the peak of answering one question. Sizes are in GiB (2^30 bytes).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_bitsandbytes_available, logging

from hub_release.measure.real_models import measure
from hub_release.measure.shapes import cache_bytes, recipes, skeleton, weight_bytes
from hub_release.measure.sizes import MODELS, ModelRow


GIB = 2**30
# the vision tower, which the recipes of the README keep in 16 bit
VISION = ["model.visual"]
# by row of the table whether it has branches, and the skip list
VARIANTS = {
    "plain": (False, VISION),
    "with Q-Zoom": (True, VISION),
    "with Q-Zoom, vision tower quantized too": (True, ["lm_head"]),
}


def rows(models: list[ModelRow], variants: list[str], measured_tokens: int | None) -> Iterator[dict[str, Any]]:
    """Bytes by recipe of every model and variant, one row each.

    Args:
        measured_tokens: number of visual tokens to measure with; None only computes.
    """
    for model in models:
        for variant in variants:
            zooms, skip = VARIANTS[variant]
            config, model_class = model.config(zooms)
            row: dict[str, Any] = {"model": model.name, "variant": variant, "bytes": {}}
            row["cache_per_token"] = cache_bytes(config, 1)
            for name, recipe in recipes(skip).items():
                counted = weight_bytes(skeleton(model_class, config, recipe))
                row["bytes"][name] = {"computed": counted.total, **vars(counted)}
                if measured_tokens is not None:
                    row["bytes"][name] |= measure(model_class, config, recipe, measured_tokens)
            yield row


def header() -> str:
    """The head of the table."""
    names = list(recipes([]))
    return f"| | {' | '.join(names)} | KV cache, 1,000 tokens |\n{'|---' * (len(names) + 2)}|"


def markdown(row: dict[str, Any]) -> str:
    """A row of the table: computed GiB, and where it was measured also measured GiB and peak."""
    cells = []
    for entry in row["bytes"].values():
        cells.append(f"{entry['computed'] / GIB:.2f}")
        if "peak" in entry:
            cells[-1] += f" ({entry['weights'] / GIB:.2f}, peak {entry['peak'] / GIB:.2f})"
    cache = f"{1000 * row['cache_per_token'] / GIB:.3f}"
    return f"| {row['model']}, {row['variant']} | {' | '.join(cells)} | {cache} |"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--measure", action="store_true", help="also build them on the CUDA device, and measure")
    parser.add_argument("--tokens", type=int, default=576, help="visual tokens of image and crop when measuring")
    parser.add_argument("--json", type=Path, help="also write the numbers here, in bytes")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    problem = None
    if not is_bitsandbytes_available():
        problem = "layers are counted as bitsandbytes makes them: pip install 'qzoom[quantize]'"
    elif options.measure and not torch.cuda.is_available():
        problem = "--measure needs a CUDA device; without it the table is computed anywhere"
    elif options.tokens < 4:
        problem = f"--tokens must be at least 4, got {options.tokens}"
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    models = [MODELS[name] for name in options.models]
    table = []
    print(header())
    for row in rows(models, options.variants, options.tokens if options.measure else None):
        print(markdown(row), flush=True)
        table.append(row)
    if options.measure:
        print(f"\nIn brackets: measured on {torch.cuda.get_device_name()}, torch {torch.__version__}.")
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
