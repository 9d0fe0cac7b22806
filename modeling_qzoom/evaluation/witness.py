"""What an independent reader can read: at the coarse budget, in the crop that the model chose, and in the source.

python -m modeling_qzoom.evaluation.witness --model FOLDER --split test --seed 1 --rows 200 --output OUT.json

Questions for a detail are only fair if the coarse view does not show it, and a crop is only good if it does. Here
somebody else says so: an OCR network that is told where the text is. On pages of mixed print sizes, where the wording
does not tell, its reading says which rows need a closer look: not legible at the coarse budget, legible in the source.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..asking.answers import BATCH_SIZE
from ..data.drawn.pages import PAGE_SETTINGS, SPLITS, named_settings
from ..data.files import check_output_file, write_json
from ..data.options import whole_number
from .reader import OcrReader
from .readings import TOKENS, Looker, questions_to_read, read_rows, witness_figures


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qzoom.evaluation.witness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="checkpoint whose crops are read (none)")
    parser.add_argument("--pages", default="varied", choices=PAGE_SETTINGS, help="how the pages are drawn (varied)")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--seed", type=whole_number(0), default=0, help="any seed gives fresh pages (0)")
    parser.add_argument("--rows", type=whole_number(1), default=200, help="rows of small print, and of mixed sizes")
    parser.add_argument("--tokens", type=whole_number(1), help=f"coarse budget without a model ({TOKENS})")
    parser.add_argument("--batch-size", type=whole_number(1), default=BATCH_SIZE)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write figures and every row's label here")
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything between the command line and its output.

    Raises:
        ValueError, OSError, ImportError: Whatever the user can put right; each with a message that says how.
    """
    if arguments.output is not None:
        check_output_file(arguments.output, "--output")
    if arguments.model is not None and arguments.tokens is not None:
        raise ValueError("--tokens has no effect with --model, whose own coarse budget counts; leave it out.")
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        raise ValueError(f"--model {arguments.model} is no folder of a checkpoint (it holds no config.json).")
    reader = OcrReader()
    looker = None if arguments.model is None else Looker.load(arguments.model, arguments.batch_size)
    rows = questions_to_read(arguments.split, arguments.seed, arguments.rows, named_settings(arguments.pages))
    readings = list(read_rows(rows, reader, looker, arguments.tokens or TOKENS))
    asked = {name: str(value) for name, value in vars(arguments).items() if value is not None}
    figures = witness_figures(readings, arguments.rows)
    return {"figures": figures, "conditions": asked, "rows": [asdict(reading) for reading in readings]}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when figures were made, 1 with a one-line error when they could not be.

    Args:
        argv: Arguments; those of the process by default.
    """
    arguments = build_parser().parse_args(argv)
    try:
        result = run(arguments)
        sys.stdout.write(json.dumps(result["figures"], indent=2) + "\n")
        if arguments.output is not None:
            write_json(arguments.output, result)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
