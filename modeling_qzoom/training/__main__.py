"""Runs one training stage: `python -m modeling_qzoom.training STAGE --config FILE.yaml [name=value ...]`."""

import argparse
import importlib
import logging
import sys
from dataclasses import dataclass

from .calibration.config import CalibrateConfig
from .common.config_files import load_config
from .common.option_help import describe_options
from .fusion.config import MineFusionConfig, TrainFusionConfig
from .gate.config import LabelGatesConfig, TrainGateConfig
from .regions.config import FindHeadsConfig, LabelRegionsConfig, TrainRegionsConfig
from .vision.config import LabelRoutesConfig, TrainRouterConfig, TrainVisionConfig


@dataclass(frozen=True)
class Stage:
    """One stage of the command.

    Attributes:
        config: dataclass of its options.
        module: module of this package whose `run` carries it out; imported only when it is used.
        summary: one line for the command's help.
    """

    config: type
    module: str
    summary: str


STAGES: dict[str, Stage] = {
    "find-heads": Stage(
        FindHeadsConfig, "regions.find_heads", "which attention heads look at what a question asks about"
    ),
    "label-regions": Stage(
        LabelRegionsConfig, "regions.label", "stage 1 data: where the model looks while it answers"
    ),
    "train-regions": Stage(TrainRegionsConfig, "regions.train", "stage 1, and 2.5 as a re-fit: the region branch"),
    "mine-fusion": Stage(MineFusionConfig, "fusion.mine", "stage 2 data: plain model right, zoomed one wrong"),
    "train-fusion": Stage(TrainFusionConfig, "fusion.train", "stage 2: the decoder answers from both views"),
    "label-gates": Stage(LabelGatesConfig, "gate.label", "stage 3 data: answers on a ladder of resolutions"),
    "train-gate": Stage(TrainGateConfig, "gate.train", "stage 3: the gate"),
    "train-vision": Stage(
        TrainVisionConfig, "vision.train", "VISOR: the decoder answers under configurations, one drawn for every step"
    ),
    "label-routes": Stage(
        LabelRoutesConfig, "vision.label_routes", "VISOR's router, data: what each configuration answers"
    ),
    "train-router": Stage(TrainRouterConfig, "vision.train_router", "VISOR's router: which configuration will do"),
    "calibrate": Stage(CalibrateConfig, "calibration.calibrate", "thresholds and presets from held-out rows"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qzoom.training",
        description="Runs one training stage; each goes on where it was stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        epilog="stages:\n" + "\n".join(f"  {name:14} {stage.summary}" for name, stage in STAGES.items()),
    )
    parser.add_argument("stage", nargs="?", choices=list(STAGES), metavar="STAGE")
    parser.add_argument("-h", "--help", action="store_true", help="list the stages; after STAGE, list its options")
    parser.add_argument("--config", help="YAML file of the stage's options")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options that win over the file's")
    return parser


def stage_help(name: str) -> str:
    """What `STAGE --help` prints: what the stage does, and every option with its type, default and help."""
    usage = f"usage: python -m modeling_qzoom.training {name} [--config FILE.yaml] [name=value ...]\n\n"
    return usage + f"{STAGES[name].summary}\n\n" + describe_options(STAGES[name].config)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 where the input is at fault."""
    parser = _parser()
    # overrides may stand on either side of --config, and may look like options themselves
    options, more = parser.parse_known_intermixed_args(arguments)
    if options.help:
        sys.stdout.write(parser.format_help() if options.stage is None else stage_help(options.stage))
        parser.exit()
    if options.stage is None:
        parser.error("the following arguments are required: STAGE")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    stage = STAGES[options.stage]
    try:
        config: object = load_config(stage.config, options.config, options.overrides + more)
        importlib.import_module(f".{stage.module}", __package__).run(config)
    except (ValueError, ImportError, OSError) as error:  # OSError: weights or folders that are not there
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
