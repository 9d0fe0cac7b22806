"""Measures a checkpoint: accuracy by kind of question, region, gate and cost, against the plain model.

python -m modeling_qzoom.evaluation --model FOLDER --data synthetic --split test --seed 1 --rows 2000 --output OUT.json

Drawn pages are made anew from the seed. A data file (JSONL or parquet with image, question and answer) is measured
with the metrics that need neither kinds of questions nor boxes.
"""

import argparse
import json
import logging
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import QZoomForConditionalGeneration, QZoomProcessor
from ..asking.answers import BATCH_SIZE
from ..asking.budgets import coarse_budget
from ..data.config import DataConfig
from ..data.drawn.pages import PAGE_SETTINGS, SPLITS
from ..data.files import check_output_file, damage_named
from ..data.options import whole_number
from ..data.readers import load_rows
from ..zoom_options_qzoom import OPTION_NAMES
from .arms import MAX_NEW_TOKENS, ArmRunner
from .benchmark import measure_drawn, measure_file
from .pareto import check_picture, draw_pareto


DRAWN = "synthetic"
LADDER, LADDER_ROWS, ROWS = (32, 64, 128, 256, 512), 400, 2000
QUICK = {"ladder": (64, 256), "ladder_rows": 24, "rows": 48}
FILE_NEW_TOKENS = 64
SPLIT, SEED = "test", 0
DTYPES = ("auto", "float32", "bfloat16")


def _budgets(text: str) -> tuple[int, ...]:
    """Budgets in tokens, separated by commas; an empty text for none."""
    return tuple(whole_number(1)(part) for part in text.split(",")) if text.strip() else ()


def _option(text: str) -> tuple[str, Any]:
    """A zoom option of `generate` by name; numbers are numbers."""
    name, equals, value = text.partition("=")
    if name == "zoom":
        raise argparse.ArgumentTypeError("zoom cannot be set: the command measures 'auto', 'always' and 'never'")
    if not equals or name not in OPTION_NAMES:
        names = ", ".join(name for name in OPTION_NAMES if name != "zoom")
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a name of {names}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qzoom.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="folder of the checkpoint")
    parser.add_argument("--data", default=DRAWN, metavar="synthetic|FILE", help="drawn pages, or a data file")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where a data file's image paths start")
    parser.add_argument("--split", choices=SPLITS, help=f"split of the drawn pages ({SPLIT})")
    parser.add_argument("--pages", choices=PAGE_SETTINGS, help="how the pages are drawn (plain)")
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        help="any seed gives fresh pages, or another choice of --rows from a data file (0)",
    )
    parser.add_argument(
        "--rows",
        type=whole_number(2),
        help=f"fine and coarse rows together ({ROWS}); at most so many of a data file (all)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write figures and conditions here")
    parser.add_argument("--effort", metavar="PRESET", help="preset of the checkpoint to measure")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="zoom option of generate"
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as stored")
    parser.add_argument("--batch-size", type=whole_number(1), default=BATCH_SIZE)
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), help=f"{MAX_NEW_TOKENS}, or {FILE_NEW_TOKENS} for a file"
    )
    parser.add_argument(
        "--ladder", type=_budgets, help=f"budgets of the plain model in tokens ({','.join(map(str, LADDER))})"
    )
    parser.add_argument(
        "--ladder-rows",
        type=whole_number(0),
        help=f"rows that run ladder and presets ({LADDER_ROWS}); 0 for no ladder",
    )
    parser.add_argument("--pareto", type=Path, metavar="FILE.png", help="draw accuracy over visual tokens")
    parser.add_argument("--page-kinds", action="store_true", help="also the summary by kind of page")
    parser.add_argument("--quick", action="store_true", help="a smoke run of 48 rows; says little about the model")
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Find what is wrong with the command line before anything is run.

    Raises:
        ValueError: A folder or file that is not there or could not be written, or options without an effect.
    """
    if not (arguments.model / "config.json").is_file():
        raise ValueError(f"--model {arguments.model} is no folder of a checkpoint (it holds no config.json).")
    if arguments.data != DRAWN and not Path(arguments.data).is_file():
        raise ValueError(f"--data {arguments.data}: there is no such file; '{DRAWN}' stands for drawn pages.")
    for name in ("output", "pareto"):
        path = getattr(arguments, name)
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent} to write to.")
        check_output_file(path, f"--{name}")
        if path.resolve() == Path(arguments.data).resolve():
            raise ValueError(f"--{name} {path} is the data file, which would be lost.")
    if arguments.pareto is not None and arguments.output is not None and arguments.pareto == arguments.output:
        raise ValueError(f"--output and --pareto are one file, {arguments.output}.")
    if arguments.pareto is not None:
        check_picture(arguments.pareto)
        if arguments.ladder_rows == 0:
            raise ValueError("--pareto needs a ladder: --ladder-rows must be at least 1.")
    if arguments.ladder and arguments.ladder_rows == 0:
        raise ValueError("--ladder needs rows to run on: --ladder-rows must be at least 1.")
    given = [name for name, _ in arguments.option]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise ValueError(f"--option gives {', '.join(twice)} more than once.")
    is_drawn = arguments.data == DRAWN
    idle = {"images": "drawn pages"} if is_drawn else dict.fromkeys(("split", "pages", "page_kinds"), "a data file")
    if not is_drawn and arguments.rows is None and not arguments.quick:
        idle["seed"] = "a data file without --rows"
    for name, data in idle.items():
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {data}; leave it out.")


def _or_default(arguments: argparse.Namespace, name: str, default: Any) -> Any:
    given = getattr(arguments, name)
    return given if given is not None else QUICK[name] if arguments.quick else default


def conditions(runner: ArmRunner, arguments: argparse.Namespace, rows: int, seconds: float) -> dict[str, Any]:
    """Under what the figures were measured; budgets in merged visual tokens."""
    model, used, recipe = runner.model, runner.main.used, runner.main.cost.recipe
    is_drawn = arguments.data == DRAWN
    return {
        "command": " ".join(["python -m modeling_qzoom.evaluation", *sys.argv[1:]]),
        "data": arguments.data,
        "rows": rows,
        "split": arguments.split or SPLIT if is_drawn else None,
        "pages": arguments.pages or "plain" if is_drawn else None,
        "seed": arguments.seed or SEED,
        "coarse_budget": list(runner.coarse) if runner.coarse else None,
        "crop_budget": [recipe.min_tokens, recipe.max_tokens] if recipe.grid.has_budget else None,
        "gate_threshold": used.gate_threshold if model.config.has_gate else None,
        "crop_rule": used.crop_budget,
        "region_threshold": [used.region_threshold, used.region_threshold_mode],
        "region_rules": [used.region_blur, used.region_min_peak, used.region_min_contrast],
        "branches": {"gate": used.gate_branch, "region": used.region_branch},
        "keep_share": used.keep_share,
        "skip_unread": used.skips_unread,
        "effort": arguments.effort,
        "auto": "derived from the arms 'always' and 'never'" if is_drawn else "run",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.vlm.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
    }


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything between the command line and its output.

    Raises:
        ValueError, OSError, ImportError: Whatever the user can put right; each with a message that says how.
    """
    _check_arguments(arguments)
    with damage_named(arguments.model):
        model = QZoomForConditionalGeneration.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
        processor = QZoomProcessor.from_pretrained(arguments.model)
    is_drawn = arguments.data == DRAWN
    ladder = _or_default(arguments, "ladder", LADDER)
    if arguments.ladder is None and coarse_budget(processor) is None:
        ladder = ()  # one fixed token grid has no ladder
    rows = _or_default(arguments, "rows", ROWS if is_drawn else None)
    runner = ArmRunner(
        model,
        processor,
        {**({"effort": arguments.effort} if arguments.effort else {}), **dict(arguments.option)},
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens or (MAX_NEW_TOKENS if is_drawn else FILE_NEW_TOKENS),
        ladder=ladder,
        ladder_rows=_or_default(arguments, "ladder_rows", LADDER_ROWS),
    )
    began = time.monotonic()
    seed = arguments.seed or SEED
    if is_drawn:
        result = measure_drawn(
            runner, arguments.split or SPLIT, seed, rows, arguments.page_kinds, arguments.pages or "plain"
        )
    else:
        images = None if arguments.images is None else str(arguments.images)
        loaded = load_rows(DataConfig(data=arguments.data, images=images, limit=rows, seed=seed))
        result = measure_file(runner, loaded)
        rows = result["other"]["rows_measured"]
    result["conditions"] = conditions(runner, arguments, rows, time.monotonic() - began)
    return result


def _as_text(result: dict[str, Any]) -> str:
    """A result as lines for a terminal."""
    lines = []
    for name, value in result["summary"].items():
        low, high = result["intervals"][name]
        lines.append(f"{name:28} {value:6.3f}   [{low:.3f}, {high:.3f}]")
    for name, value in result["other"].items():
        if isinstance(value, (int, float)):
            lines.append(f"{name:28} {value:6.3f}" if isinstance(value, float) else f"{name:28} {value}")
    for point in result["ladder"]:
        tokens = f"{point['visual_tokens']:.0f} tokens"
        lines.append(f"{point['model']:6}{point['label']:>10} {point['accuracy']:6.3f} at {tokens}")
    lines += [f"{name:28} {value}" for name, value in result["conditions"].items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when figures were made, 1 with a one-line error when they could not be.

    Args:
        argv: Arguments; those of the process by default.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("modeling_qzoom").setLevel(logging.INFO)
    try:
        result = evaluate(arguments)
        sys.stdout.write(_as_text(result))  # first: whatever happens to the files, the figures are there
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if arguments.pareto is not None:
            draw_pareto(result["ladder"], arguments.pareto)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
