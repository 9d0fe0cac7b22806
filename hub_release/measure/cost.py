"""What a question costs before its first new token, at the sizes of real VLMs: `python -m hub_release.measure.cost`.

FLOPs in closed form (`modeling_qzoom/asking/cost.py`, which tests hold against counted FLOPs), vision tower
included: the plain model at a large image budget against Q-Zoom at a small one, gate closed and gate open. No weight
is made and nothing is downloaded. FLOPs are not seconds; `hub_release.measure.speed` measures those on a CUDA device.
"""

import argparse
import sys

from hub_release.measure.sizes import MODELS
from modeling_qzoom import QZoomConfig
from modeling_qzoom.asking.cost import PrefillCost, Prompt
from modeling_qzoom.zoom_options_qzoom import ZoomOptions, resolve_options


# tokens before the image: the chat template's system prompt and the image's start marker
PREFIX = 15


def square(tokens: int) -> tuple[int, int]:
    """Grid (height, width) of a square image of about so many visual tokens."""
    side = max(1, round(tokens**0.5))
    return side, side


def costs(config: QZoomConfig, large: int, small: int, crop: int, text: int) -> dict[str, float]:
    """TFLOPs of one prefill by row of the table.

    Args:
        large: budget of the plain model in visual tokens.
        small, crop: visual tokens of Q-Zoom's coarse view, and of its crop.
        text: tokens after the image.
    """
    config.crop_min_tokens, config.crop_max_tokens = 1, crop
    options: ZoomOptions = resolve_options({}, (), config, mrope=True)
    cost = PrefillCost(config, options)

    def prompt(tokens: int) -> Prompt:
        grid = square(tokens)
        return Prompt(tokens=PREFIX + grid[0] * grid[1] + 1 + text, suffix=text, grid=grid)

    flops = {
        f"plain, {large} tokens": cost.plain(prompt(large)),
        f"plain, {small} tokens": cost.plain(prompt(small)),
        f"Q-Zoom, {small} tokens, gate closed": cost.skipped(prompt(small)),
        f"Q-Zoom, {small} tokens and a crop of {crop}": cost.zoomed(prompt(small), square(crop)),
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
    parser.add_argument("--text", type=int, default=64, help="tokens of the question")
    options = parser.parse_args(arguments)
    table = {}
    for row in MODELS.values():
        config, _ = row.config(zooms=True)
        table[row.name] = costs(config, options.large, options.small, options.crop, options.text)
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
