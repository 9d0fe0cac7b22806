"""Serves a checkpoint with OpenAI's API: `python -m modeling_qzoom.serving MODEL`.

The model's replicas run on Ray Serve, on the machine at hand or, where RAY_ADDRESS names one, on a cluster.
`--in-process` leaves Ray out: one model in this process. SIGTERM and Ctrl-C end the server once everything that was
accepted has been answered.
"""

import argparse
import logging
import os
import sys
import types
import typing
from typing import Any

from pydantic import ValidationError

from ..messages_qzoom import one_line
from .config import ServeConfig


logger = logging.getLogger("qzoom.serving")


def build_parser() -> argparse.ArgumentParser:
    """The command line; all options of `ServeConfig` are flags."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qzoom.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a Q-Zoom checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--in-process", action="store_true", default=False, help="one model here, without Ray")
    for name, field in ServeConfig.model_fields.items():
        if name == "model":
            continue
        flag, kind = f"--{name.replace('_', '-')}", field.annotation
        default = "" if field.default in (None, "", [], False) else f" ({field.default})"
        settings: dict[str, Any] = {"help": f"{field.description}{default}"}
        if kind is bool:
            settings["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            settings.update(nargs="+", metavar="NAME")
        else:
            of_number = {int, float} & {kind, *(typing.get_args(kind) if isinstance(kind, types.UnionType) else ())}
            settings["metavar"] = "N" if of_number else "TEXT"
        parser.add_argument(flag, **settings)
    return parser


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's findings, under the flag's name."""
    found = error.errors(include_url=False, include_context=False)[0]
    flag = "--" + str(found["loc"][0]).replace("_", "-") if found["loc"] else ""
    return f"{flag}: {found['msg']}, got {found['input']!r}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = vars(build_parser().parse_args(arguments))
    host, port, in_process = (options.pop(name) for name in ("host", "port", "in_process"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody unless asked for
    try:
        config = ServeConfig(**options)
        config.api_key()
        if in_process and config.replicas > 1:
            raise ValueError(f"--in-process is one model; leave it out to serve {config.replicas} replicas.")
        from .running import serve_in_process, serve_on_ray

        (serve_in_process if in_process else serve_on_ray)(config, host, port)
    except ValidationError as error:
        sys.stderr.write(f"error: {_sentence(error)}\n")
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
