"""Ablations of the demo: what each part of the method is worth, measured on the recipe's work folder.

    python -m hub_release.demo.ablations [--quick] [--only NAME ...]

Every arm retrains only what it changes, for two epochs, and is measured on the same validation pages with the same
thresholds. What exists in the folder `ablations` is not made again. `--quick` trains one epoch and measures 60 rows:
it shows that everything runs and says little about the model.
"""

import argparse
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from hub_release.demo.clock import Clock
from hub_release.demo.recipe import attach, evaluate, run_stage
from hub_release.repository.files import ROOT
from modeling_qzoom.data.rows import Rows
from modeling_qzoom.training.common.label_store import Manifest, ShardStore, read_labels, read_manifest
from modeling_qzoom.training.regions.rule import covered_cells


REGION_FIGURES = ("fine_accuracy_zoom", "region_recall", "region_area")
GATE_FIGURES = ("gate_auroc", "gating_loss", "zoomed_share_coarse")
FUSION_FIGURES = ("fine_accuracy_zoom", "coarse_accuracy_zoom")


@dataclass
class Bench:
    """What arms share.

    Attributes:
        work: work folder of the recipe.
        folder: where arms and their figures go.
        rows: number of validation rows.
        quick: whether arms are trained for one epoch only.
        clock: adds up the time of training.
    """

    work: Path
    folder: Path
    rows: int
    quick: bool
    clock: Clock

    def train(self, stage: str, arm: str, **overrides: Any) -> Path:
        """Trains an arm's branch and returns its checkpoint."""
        output = self.folder / arm
        overrides["trainer.num_train_epochs"] = 1 if self.quick else 2
        run_stage(self.clock, stage, f"{stage}, {arm}", output=output, **overrides)
        return output

    def regions(self, arm: str, **overrides: Any) -> Path:
        """A region branch trained from the first labels."""
        defaults = {"model": self.work / "attached", "labels": self.work / "region-labels"}
        return self.train("train-regions", arm, **{**defaults, **overrides})

    def measure(self, model: Path, arm: str, figures: tuple[str, ...], *options: str) -> dict[str, float]:
        """Figures of a checkpoint on validation pages."""
        output = self.folder / f"{arm}-{self.rows}.json"
        options = ("--split", "validation", "--seed", "7", "--ladder-rows", "0", *options)
        summary = evaluate(model, output, self.rows, *options)["summary"]
        return {name: summary[name] for name in figures}


def true_box_labels(source: Path, target: Path) -> Path:
    """Writes labels whose maps are the true boxes instead of the model's attention."""
    given = read_manifest(source, "label-regions")
    manifest = Manifest(given["stage"], given["backbone"], given["rows"], {**given["settings"], "maps": "true boxes"})
    store = ShardStore(target, manifest, 1)

    def boxed(_rows: Any, _bad: Any) -> list[dict[str, Any]]:
        records = []
        for record in read_labels(source, "label-regions", None):
            grid = (record["height"], record["width"])
            scale = [grid[1] / record["image_width"], grid[0] / record["image_height"]] * 2
            cells = covered_cells(tuple(edge * by for edge, by in zip(record["box"], scale, strict=True)), grid)
            maps = {"grounding": cells.flatten().numpy(), "sinks": torch.zeros(grid).flatten().numpy()}
            records.append({**record, **maps})
        return records

    # one shard with all records: a single row stands for them
    store.make(cast(Rows, [None]), 1, boxed)
    return target


def labels_arm(bench: Bench) -> dict[str, dict[str, float]]:
    """Self-distilled labels against true boxes."""
    boxes = true_box_labels(bench.work / "region-labels", bench.folder / "box-labels")
    own, true = bench.regions("self-distilled"), bench.regions("true-boxes", labels=boxes)
    return {
        "self-distilled": bench.measure(own, "self-distilled", REGION_FIGURES),
        "true boxes": bench.measure(true, "true-boxes", REGION_FIGURES),
    }


def sinks_arm(bench: Bench) -> dict[str, dict[str, float]]:
    """Sinks removed against kept."""
    removed = bench.regions("self-distilled")
    if not yaml.safe_load((bench.work / "heads.yaml").read_text())["sink_heads"]:
        return {"no head qualifies as a sink": bench.measure(removed, "self-distilled", REGION_FIGURES)}
    kept = bench.regions("sinks-kept", **{"rule.remove_sinks": False})
    return {
        "sinks removed": bench.measure(removed, "self-distilled", REGION_FIGURES),
        "sinks kept": bench.measure(kept, "sinks-kept", REGION_FIGURES),
    }


def states_arm(bench: Bench) -> dict[str, dict[str, float]]:
    """Tri-state against binary labels."""
    three, two = bench.regions("self-distilled"), bench.regions("binary", **{"rule.tri_state": False})
    return {
        "tri-state": bench.measure(three, "self-distilled", REGION_FIGURES),
        "binary": bench.measure(two, "binary", REGION_FIGURES),
    }


def positions_arm(bench: Bench) -> dict[str, dict[str, float]]:
    """Continuous against sequential positions of the crop, in the finished model."""
    model = bench.work / "seed-0" / "calibrated"
    return {
        kind: bench.measure(model, kind, FUSION_FIGURES, "--option", f"position_alignment={kind}")
        for kind in ("continuous", "sequential")
    }


def fusion_arm(bench: Bench) -> dict[str, dict[str, float]]:
    """With and without stage 2; the gate is untrained in both, so every row zooms."""
    zoom = ("--option", "gate_threshold=0")
    return {
        "without": bench.measure(bench.work / "regions", "without-stage-2", FUSION_FIGURES, *zoom),
        "with": bench.measure(bench.work / "fused", "with-stage-2", FUSION_FIGURES, *zoom),
    }


def gates_arm(bench: Bench) -> dict[str, dict[str, float]]:
    """Consistency-aware against naive gate labels."""
    base = {"model": bench.work / "seed-0" / "refit", "labels": bench.work / "gate-labels"}
    figures = {}
    for labeling in ("consistent", "naive"):
        model = bench.train("train-gate", f"gate-{labeling}", labeling=labeling, **base)
        half = ("--option", "gate_threshold=0.5")
        figures[labeling] = bench.measure(model, f"gate-{labeling}", GATE_FIGURES, *half)
    return figures


def depth_arm(bench: Bench) -> dict[str, dict[str, float]]:
    """Where the branch reads (K) and how deep it is (T)."""
    figures = {}
    figures["K = 3, T = 2"] = bench.measure(bench.regions("self-distilled"), "self-distilled", REGION_FIGURES)
    for layer, depth in ((2, 2), (4, 2), (3, 1), (3, 3)):
        arm = f"K{layer}-T{depth}"
        attach(bench.work, bench.folder / f"{arm}-attached", branch_layer=layer, branch_depth=depth)
        model = bench.regions(arm, model=bench.folder / f"{arm}-attached")
        figures[f"K = {layer}, T = {depth}"] = bench.measure(model, arm, REGION_FIGURES)
    return figures


ARMS: dict[str, Callable[[Bench], dict[str, dict[str, float]]]] = {
    "labels": labels_arm,
    "sinks": sinks_arm,
    "states": states_arm,
    "positions": positions_arm,
    "fusion": fusion_arm,
    "gates": gates_arm,
    "depth": depth_arm,
}


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One table an ablation."""
    parts = []
    for name, arms in results.items():
        title = (ARMS[name].__doc__ or name).strip()
        columns = list(next(iter(arms.values())))
        lines = [title, "", f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {arm} | {' | '.join(f'{figures[c]:.3f}' for c in columns)} |" for arm, figures in arms.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo-stages", help="work folder of the recipe")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--rows", type=int, default=300, help="validation rows an arm is measured on")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS), help="these ablations alone")
    parser.add_argument("--jobs", type=int, default=1, help="ablations that run side by side")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    work = arguments.work.resolve()
    folder = work / ("ablations-quick" if arguments.quick else "ablations")
    folder.mkdir(parents=True, exist_ok=True)
    rows = 60 if arguments.quick else arguments.rows
    bench = Bench(work, folder, rows, arguments.quick, Clock(folder / "times.json"))
    if {"labels", "sinks", "states", "depth"} & set(arguments.only):
        bench.measure(bench.regions("self-distilled"), "self-distilled", REGION_FIGURES)  # what these share
    with ThreadPoolExecutor(arguments.jobs) as pool:
        figures = pool.map(lambda name: ARMS[name](bench), arguments.only)
        results = dict(zip(arguments.only, figures, strict=True))
    minutes = sum(bench.clock.read().values()) / 60
    if arguments.output is not None:
        content = {"results": results, "rows": rows, "quick": arguments.quick, "training_minutes": round(minutes, 1)}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")
    print(markdown(results))
    print(f"{rows} validation rows an arm, {minutes:.0f} minutes of training on this machine.")


if __name__ == "__main__":
    main()
