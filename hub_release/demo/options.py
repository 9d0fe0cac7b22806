"""What each option of the layer plans costs and saves on the demo: accuracy against FLOPs, with intervals.

    python -m hub_release.demo.options [--rows 300] [--split validation] [--seed 7]

Every arm asks the same pages under other options. Arms that exist in the work folder are not measured again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hub_release.demo.recipe import evaluate
from hub_release.repository.files import ROOT


# options of each arm, from nothing left out to all that is; the region branch runs as it was trained
ARMS: dict[str, dict[str, Any]] = {
    "every token in every layer": {"gate_branch": "full", "keep_share": 1.0, "skip_unread": False},
    "unread tokens left out": {"gate_branch": "full", "keep_share": 1.0},
    "light gate": {"gate_branch": "light", "keep_share": 1.0},
    **{
        f"light gate, {share:.0%} of the coarse tokens kept": {"gate_branch": "light", "keep_share": share}
        for share in (0.5, 0.25, 0.1, 0.0)
    },
}
_FIGURES = (
    ("fine_accuracy_zoom", "summary"),
    ("coarse_accuracy_zoom", "summary"),
    ("region_recall", "summary"),
    ("gate_auroc", "summary"),
    ("prefill_gflops_fine_auto", "other"),
    ("prefill_gflops_coarse_auto", "other"),
)


def measure_arms(model: Path, folder: Path, rows: int, split: str, seed: int) -> dict[str, Any]:
    """Figures of every arm on the same pages.

    Args:
        folder: work folder for the arms' own files.

    Returns:
        Per arm its options, figures and intervals; and the conditions of the first arm.
    """
    arms: dict[str, Any] = {}
    conditions: dict[str, Any] = {}
    for number, (name, options) in enumerate(ARMS.items()):
        given = [
            part
            for key, value in options.items()
            for part in ("--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        ]
        output = folder / f"{number}-{split}-{seed}-{rows}.json"
        measured = evaluate(model, output, rows, "--split", split, "--seed", str(seed), "--ladder-rows", "0", *given)
        conditions = conditions or measured["conditions"]
        arms[name] = {
            "options": options,
            "figures": {figure: measured[part][figure] for figure, part in _FIGURES},
            "intervals": {figure: measured["intervals"].get(figure) for figure, _ in _FIGURES},
        }
    return {"arms": arms, "conditions": conditions}


def markdown(results: dict[str, Any]) -> str:
    """A table of the arms and the command's conditions."""
    lines = [
        "| | small print | large print | regions found | GFLOPs, zoomed | GFLOPs, skipped |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in results["arms"].items():
        cells = [name]
        for figure, _ in _FIGURES:
            if figure == "gate_auroc":
                continue
            value, interval = arm["figures"][figure], arm["intervals"][figure]
            around = f" ({interval[0]:.3f} – {interval[1]:.3f})" if interval and "accuracy" in figure else ""
            cells.append(f"{value:.3f}{around}")
        lines.append(f"| {' | '.join(cells)} |")
    conditions = ", ".join(f"{key} {value}" for key, value in results["conditions"].items() if key != "command")
    return "\n".join(lines) + f"\n\n`python -m hub_release.demo.options`: {conditions}.\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("hub_release/checkpoints/qzoom-demo"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo-options", help="folder of the arms' files")
    parser.add_argument("--rows", type=int, default=300, help="rows an arm is measured on")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = measure_arms(arguments.model, arguments.work, arguments.rows, arguments.split, arguments.seed)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
