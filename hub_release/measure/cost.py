"""What a question costs before its first new token, at the sizes of real VLMs: `python -m hub_release.measure.cost`.

FLOPs in closed form (`zoom_cost`, which tests hold against counted FLOPs), vision tower included: the plain model at a
large image budget against Q-Zoom at a small one, gate closed and gate open, under the options of a new checkpoint. No
weight is made and nothing is downloaded. FLOPs are not seconds; `hub_release.measure.speed` measures those on a CUDA
device, and `examples/benchmark.py` compares options.
"""

import argparse
import sys
from typing import Any

from hub_release.measure.sizes import MODELS
from modeling_qzoom import QZoomConfig, zoom_cost
from modeling_qzoom.measuring.rows import SQUARE


def costs(config: QZoomConfig, large: int, small: int, crop: int, text: int) -> dict[str, float]:
    """TFLOPs of one prefill by row of the table.

    Args:
        config: the model's configuration, whose options are in force.
        large: budget of the plain model in visual tokens.
        small, crop: visual tokens of Q-Zoom's coarse view, and of its crop.
        text: tokens of the prompt beside the visual ones.
    """
    lengths: dict[str, Any] = {"crop_tokens": crop, "text_tokens": text}
    at_large = zoom_cost(config, SQUARE, max_tokens=large, **lengths)
    at_small = zoom_cost(config, SQUARE, max_tokens=small, **lengths)
    flops = {
        f"plain, {large} tokens": at_large.plain.flops,
        f"plain, {small} tokens": at_small.plain.flops,
        f"Q-Zoom, {small} tokens, gate closed": at_small.skipped.flops,
        f"Q-Zoom, {small} tokens and a crop of {crop}": at_small.zoomed.flops,
    }
    return {name: count / 1e12 for name, count in flops.items()}


def markdown(table: dict[str, dict[str, float]]) -> str:
    """One column for each model: TFLOPs, and their share of the first row."""
    lines = [f"| TFLOPs of a prefill | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    for name in next(iter(table.values())):
        cells = [f"{column[name]:.1f} ({column[name] / next(iter(column.values())):.0%})" for column in table.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=4096, help="visual tokens of the plain model's image")
    parser.add_argument("--small", type=int, default=576, help="visual tokens of Q-Zoom's coarse view")
    parser.add_argument("--crop", type=int, default=576, help="visual tokens of the crop")
    parser.add_argument("--text", type=int, default=64, help="tokens of the prompt beside the visual ones")
    options = parser.parse_args(arguments)
    table = {}
    for row in MODELS.values():
        config, _ = row.config(zooms=True)
        table[row.name] = costs(config, options.large, options.small, options.crop, options.text)
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
