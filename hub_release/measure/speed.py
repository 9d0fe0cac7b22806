"""Seconds and memory of one question on a CUDA device: `python -m hub_release.measure.speed`.

The plain model at a large image budget against Q-Zoom at a small one, gate closed and gate open, at the sizes of real
VLMs with random weights: time does not depend on their values, and where it looks does not matter because every crop
gets the same budget. Answers mean nothing. Every time is the median of several runs, with the fastest and the slowest.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from hub_release.measure.memory import GIB
from hub_release.measure.real_models import load_random, question
from hub_release.measure.sizes import MODELS
from modeling_qzoom.measuring.times import peak_bytes, seconds_of


# gate thresholds that every probability and none reaches
OPEN, CLOSED = 0.0, 1.1


def arms(large: int, small: int) -> dict[str, tuple[int, dict[str, Any]]]:
    """By row of the table the image's budget in visual tokens and the options of `generate`."""
    never = {"zoom": "never"}
    return {
        f"plain, {large} tokens": (large, never),
        f"plain, {small} tokens": (small, never),
        f"Q-Zoom, {small} tokens, gate closed": (small, {"zoom": "auto", "gate_threshold": CLOSED}),
        f"Q-Zoom, {small} tokens and a crop": (small, {"zoom": "auto", "gate_threshold": OPEN}),
    }


def timed(
    model: PreTrainedModel, inputs: dict[str, Any], options: dict[str, Any], new_tokens: int, runs: int
) -> list[float]:
    """Seconds of `generate` for exactly so many new tokens, sorted; two runs beforehand do not count."""

    def call() -> None:
        model.generate(**inputs, **options, max_new_tokens=new_tokens, min_new_tokens=new_tokens)

    return sorted([seconds_of(call, model.device)[0] for _ in range(runs + 2)][2:])


def measure(
    model: PreTrainedModel, tokens: int, options: dict[str, Any], new_tokens: int, runs: int
) -> dict[str, Any]:
    """Seconds to the first token and to the last, peak bytes, and what was looked at."""
    inputs, defaults = question(model.config, tokens)
    options = {**defaults, "return_dict_in_generate": True, **options}
    first, whole = timed(model, inputs, options, 1, runs), timed(model, inputs, options, new_tokens, runs)
    reports = []

    def call() -> None:
        reports.extend(model.generate(**inputs, **options, max_new_tokens=new_tokens).zoom_reports)

    peak, report = peak_bytes(call, model.device), reports[0]
    view = {"reason": report.reason, "coarse_tokens": report.coarse_tokens, "crop_tokens": report.crop_tokens}
    return {"first_token": first, "all_tokens": whole, "peak": peak, **view}


def markdown(rows: list[dict[str, Any]], new_tokens: int) -> str:
    """The rows of one model as a table; ratios are against its first row."""
    names = ("", "first token, ms", "of the first row", f"{new_tokens} tokens, ms", "of the first row", "peak, GiB")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{row['name']} ({row['coarse_tokens']} + {row['crop_tokens']})"]
        for key in ("first_token", "all_tokens"):
            seconds = row[key]
            cells.append(f"{1e3 * median(seconds):.0f} ({1e3 * seconds[0]:.0f} – {1e3 * seconds[-1]:.0f})")
            cells.append(f"{median(seconds) / median(rows[0][key]):.2f}")
        lines.append(f"| {' | '.join(cells)} | {row['peak'] / GIB:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["7B", "4B"])
    parser.add_argument("--large", type=int, default=4096, help="budget of the plain model, in visual tokens")
    parser.add_argument("--small", type=int, default=576, help="budget of Q-Zoom, and of its crop")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5, help="measured runs")
    parser.add_argument("--json", type=Path, help="also write the numbers here, in seconds and bytes")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    if not torch.cuda.is_available():
        print("error: times are measured on a CUDA device, and there is none", file=sys.stderr)
        return 1
    device = f"{torch.cuda.get_device_name()}, bfloat16, sdpa, batch 1, torch {torch.__version__}"
    results: dict[str, Any] = {"device": f"{device}, transformers {transformers.__version__}", "models": {}}
    for name in options.models:
        config, model_class = MODELS[name].config(zooms=True)
        model = load_random(model_class, config, None, "cuda")
        rows = []
        for arm, (tokens, settings) in arms(options.large, options.small).items():
            rows.append({"name": arm, **measure(model, tokens, settings, options.new_tokens, options.runs)})
        del model
        torch.cuda.empty_cache()
        results["models"][MODELS[name].name] = rows
        print(f"{MODELS[name].name}\n\n{markdown(rows, options.new_tokens)}\n", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(results["device"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
