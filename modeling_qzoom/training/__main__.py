"""Runs one training stage: `python -m modeling_qzoom.training STAGE --config FILE.yaml [name=value ...]`."""

import argparse
import importlib
import logging
import sys

from .common.config_files import load_config
from .stages import STAGES


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 where the input is at fault."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qzoom.training",
        description="Runs one training stage; each goes on where it was stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="stages:\n" + "\n".join(f"  {name:14} {stage.summary}" for name, stage in STAGES.items()),
    )
    parser.add_argument("stage", choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--config", help="YAML file of the stage's options")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options that win over the file's")
    # overrides may stand on either side of --config, and may look like options themselves
    given, more = parser.parse_known_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    stage = STAGES[given.stage]
    try:
        config: object = load_config(stage.config, given.config, given.overrides + more)
        importlib.import_module(f".{stage.module}", __package__).run(config)
    except (ValueError, ImportError, OSError) as error:  # OSError: weights or folders that are not there
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
