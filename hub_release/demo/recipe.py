"""From nothing to the demo checkpoint: `python -m hub_release.demo.recipe`.

The backbone is trained from scratch; what follows are the stages of `python -m modeling_qzoom.training`, as a user
runs them, with the configurations in `configs/` beside this file. What exists in the work folder is not made again, so
an interrupted run goes on where it stopped; `times.json` there adds up what each step took. The backbone is sized for
a GPU (six minutes on an H100; a step of its longest stage took 43 seconds on one CPU thread), the stages for a CPU.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from hub_release.card.tables import figure_table, page_kind_table, short_table, spread_table
from hub_release.demo.backbone.loop import load_state
from hub_release.demo.backbone.model import build_backbone, demo_config
from hub_release.demo.backbone.tokenizer import SPECIAL_TOKENS, build_tokenizer
from hub_release.demo.backbone.train import DecoderStage, train_decoder, train_tower, training_parts
from hub_release.demo.checkpoint import write_attached, write_card, write_checkpoint
from hub_release.demo.clock import Clock, history_of
from hub_release.repository.files import EVALUATION, FIGURE_KINDS, ROOT
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from modeling_qzoom.data.drawn.questions import question_corpus


TOWER_STEPS, TOWER_VIEWS = 312, 144
# to read close up and to search large print; then pages with crops; then small print at every budget
DECODER_STAGES = (
    DecoderStage("2-search", 401, {"crop": 24, "whole": 48}, decay=0.0),
    DecoderStage("3-pages", 446, {"crop": 20, "whole": 36, "page": 20}, decay=0.0),
    DecoderStage("4-polish", 1338, {"crop": 10, "search": 30, "page": 40, "large": 12}, decay=0.9),
)
REPORT = Path(__file__).with_name("REPORT.md")
MARKERS = ("<!-- figures -->", "<!-- end of figures -->")


def fresh_backbone() -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """The untrained backbone and its tokenizer."""
    tokenizer = build_tokenizer(question_corpus())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    # a vocabulary of a multiple of 64, like every other width
    return build_backbone(demo_config(-(-len(tokenizer) // 64) * 64, ids)), tokenizer


def train_backbone(work: Path, scale: float, device: str, clock: Clock) -> None:
    """Runs the backbone's stages that have not left their weights yet.

    Args:
        scale: factor on every stage's number of steps.
        device: where it trains.
    """
    model, tokenizer = fresh_backbone()
    model.to(device)
    parts = training_parts(model, tokenizer).to(device)
    paths = [work / "1-tower.safetensors", *(work / f"{stage.name}.safetensors" for stage in DECODER_STAGES)]
    newest = max((index for index, path in enumerate(paths) if path.exists()), default=-1)
    if newest >= 0:
        load_state(parts, paths[newest])
    place = torch.cuda.get_device_name() if device.startswith("cuda") else "a CPU"
    for index in range(newest + 1, len(paths)):
        with clock.step(f"{paths[index].stem} ({place})"):
            if index == 0:
                train_tower(parts, round(TOWER_STEPS * scale), paths[0], TOWER_VIEWS)
                continue
            stage = DECODER_STAGES[index - 1]
            scaled = replace(stage, steps=round(stage.steps * scale))
            train_decoder(model, parts, tokenizer, scaled, paths[index], seed=index)


def attach(work: Path, folder: Path, **branches: int) -> None:
    """Writes the backbone with untrained branches, unless that is done."""
    if not (folder / "config.json").exists():
        vlm, tokenizer = fresh_backbone()
        load_state(training_parts(vlm, tokenizer), work / f"{DECODER_STAGES[-1].name}.safetensors")
        write_attached(vlm.eval(), tokenizer, folder, **branches)


def run_stage(clock: Clock, stage: str, name: str | None = None, **overrides: Any) -> None:
    """Runs a training stage with the demo's configuration, as its command.

    Args:
        name: name of the step, by default that of the stage.
        overrides: options that win over the file's.
    """
    options = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in overrides.items()]
    config = ROOT / "hub_release" / "demo" / "configs" / f"{stage}.yaml"
    command = [sys.executable, "-m", "modeling_qzoom.training", stage, "--config", str(config), *options]
    with clock.step(name or stage):
        subprocess.run(command, cwd=ROOT, check=True)


def train_branches(work: Path, clock: Clock) -> None:
    """Runs stages 1 and 2 and makes the labels of 2.5 and 3: everything that all seeds share."""
    attach(work, work / "attached")
    if not (work / "heads.yaml").exists():
        run_stage(clock, "find-heads", model=work / "attached", output=work / "heads.yaml")
    heads, regions = work / "heads.yaml", work / "regions"
    run_stage(clock, "label-regions", model=work / "attached", heads=heads, output=work / "region-labels")
    run_stage(clock, "train-regions", model=work / "attached", labels=work / "region-labels", output=regions)
    run_stage(clock, "mine-fusion", model=regions, output=work / "fusion-cases")
    run_stage(clock, "train-fusion", model=regions, labels=work / "fusion-cases", output=work / "fused")
    run_stage(clock, "label-gates", model=work / "fused", output=work / "gate-labels")
    again = {"heads": heads, "output": work / "refit-labels"}
    run_stage(clock, "label-regions", "label-regions, again", model=work / "fused", **again)


def finish_seed(work: Path, clock: Clock, seed: int) -> Path:
    """Runs stages 2.5 and 3 and the calibration with a seed, and returns the checkpoint's folder."""
    folder, mark = work / f"seed-{seed}", "" if seed == 0 else f", seed {seed}"
    refit = {"labels": work / "refit-labels", "output": folder / "refit", "reset": False, "seed": seed}
    refit["trainer.num_train_epochs"] = 2  # the branch is trained already
    run_stage(clock, "train-regions", f"train-regions, re-fit{mark}", model=work / "fused", **refit)
    gate = {"labels": work / "gate-labels", "output": folder / "gated", "seed": seed}
    run_stage(clock, "train-gate", f"train-gate{mark}", model=folder / "refit", other_backbone=False, **gate)
    light = make_light(work, clock, folder, mark)
    done = folder / "calibrated"
    if not (done / "config.json").exists():
        report = folder / "calibration.json"
        run_stage(clock, "calibrate", f"calibrate{mark}", model=light, output=done, report=report)
    return done


def make_light(work: Path, clock: Clock, folder: Path, mark: str) -> Path:
    """Re-fits the region branch as a light one on twice the labels, and lets zoomed rows keep a tenth of their tokens.

    The gate is light from here on without training.
    """
    labels, light, planned = folder / "light-labels", folder / "light-region", folder / "light"
    again = {"model": folder / "gated", "heads": work / "heads.yaml", "output": labels, "limit": 4800}
    run_stage(clock, "label-regions", f"label-regions, light{mark}", **again)
    fit = {"labels": labels, "output": light, "branch": "light", "reset": False, "trainer.num_train_epochs": 3}
    run_stage(clock, "train-regions", f"train-regions, light{mark}", model=folder / "gated", **fit)
    if not (planned / "config.json").exists():
        model, processor = QZoomForConditionalGeneration.from_pretrained(light), QZoomProcessor.from_pretrained(light)
        model.config.gate_branch, model.config.keep_share = "light", 0.1
        model.save_pretrained(planned)
        processor.save_pretrained(planned)
    return planned


def evaluate(folder: Path, output: Path, rows: int, *arguments: str) -> dict[str, Any]:
    """Figures of a checkpoint, measured unless they exist."""
    if not output.exists():
        place = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
        options = ["--model", str(folder), "--rows", str(rows), "--output", str(place), *arguments]
        subprocess.run([sys.executable, "-m", "modeling_qzoom.evaluation", *options], cwd=ROOT, check=True)
    return json.loads(output.read_text())


def write_spread(folders: list[Path], output: Path, rows: int, jobs: int = 1) -> None:
    """Measures the checkpoints of all seeds on the same rows, and writes lowest, mean and highest of every figure."""
    options = ("--split", "test", "--seed", "2", "--ladder-rows", "0")
    with ThreadPoolExecutor(jobs) as pool:
        runs = pool.map(lambda folder: evaluate(folder, folder.parent / "figures.json", rows, *options), folders)
        measured = [figures["summary"] for figures in runs]
    spread = {}
    for name in measured[0]:
        values = [figures[name] for figures in measured]
        spread[name] = {"lowest": min(values), "mean": sum(values) / len(values), "highest": max(values)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"seeds": len(folders), "rows": rows, "spread": spread}, indent=2) + "\n")


def write_figures(path: Path, text: str) -> None:
    """Put figures between the two markers of a document."""
    before, rest = path.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    path.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}", encoding="utf-8")


def publish(source: Path, output: Path, clock: Clock, rows: int, jobs: int = 1) -> None:
    """Write the checkpoint, measure it, and put the figures into its card, the report and the README."""
    model, processor = QZoomForConditionalGeneration.from_pretrained(source), QZoomProcessor.from_pretrained(source)
    write_checkpoint(model, processor, output)
    measured = {kind: output / EVALUATION / f"{kind}.json" for kind in FIGURE_KINDS}
    measured["times"].parent.mkdir(exist_ok=True)
    shutil.copy(clock.path, measured["times"])
    trained = max(path.stat().st_mtime for path in source.iterdir())
    for name in ("figures", "shifted", "ablations"):
        if measured[name].exists() and measured[name].stat().st_mtime < trained:
            measured[name].unlink()  # of older weights
    relative = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    picture = ("--pareto", "examples/assets/pareto.png", "--page-kinds")
    shifted = ("--split", "shifted", "--seed", "1", "--ladder-rows", "0")
    with ThreadPoolExecutor(jobs) as pool:
        test = pool.submit(evaluate, relative, measured["figures"], rows, "--split", "test", "--seed", "1", *picture)
        other = pool.submit(evaluate, relative, measured["shifted"], rows // 4, *shifted)
    figures = test.result()
    parts = [figure_table(figures, other.result()), page_kind_table(figures)]
    if measured["seeds"].exists():
        parts.append(spread_table(json.loads(measured["seeds"].read_text())))
    table, history = "\n\n".join(part for part in parts if part), history_of(clock.read())
    write_card(output, history)
    write_figures(ROOT / "README.md", short_table(figures))
    write_figures(REPORT, table + "\n\n" + history)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo-stages", help="folder of all stages")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the backbone stages' numbers of steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for the backbone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the last stages; the first ships")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run side by side")
    parser.add_argument("--output", type=Path, default=ROOT / "hub_release" / "checkpoints" / "qzoom-demo")
    parser.add_argument("--rows", type=int, default=2000, help="fresh rows that the figures are measured on")
    parser.add_argument("--until", choices=["backbone", "labels", "seeds", "end"], default="end", help="where to stop")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    work = arguments.work.resolve()
    clock = Clock(work / "times.json")
    train_backbone(work, arguments.scale, arguments.device, clock)
    if arguments.until == "backbone":
        return
    train_branches(work, clock)
    if arguments.until == "labels":
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        finished = list(pool.map(lambda seed: finish_seed(work, clock, seed), arguments.seeds))
    output = arguments.output.resolve()
    if len(finished) > 1:
        write_spread(finished, output / EVALUATION / "seeds.json", arguments.rows // 4, arguments.jobs)
    if arguments.until == "end":
        publish(finished[0], output, clock, arguments.rows, arguments.jobs)


if __name__ == "__main__":
    main()
