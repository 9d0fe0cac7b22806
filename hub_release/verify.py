"""Proves that a folder can be published: `verify.py FOLDER`.

First what can be seen without running anything: the files, the code's imports, `auto_map`, the weights, the card. Then
the folder is loaded in a clean virtual environment, made for the purpose, which has never heard of this package: every
Auto class, the pipeline and a saved copy have to give the same answer to a question. `--python` names the interpreter
of an environment that exists already, `--here` takes this one. The last line is the verdict; exit status 0 or 1.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


# called as a file, Python looks for packages beside it; ours are one folder up
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers.utils import logging

from hub_release.checks.clean_environment import PACKAGES, disagreements, make_environment, probe
from hub_release.checks.folder import check_folder
from hub_release.repository.code import code_files
from hub_release.repository.errors import BuildError
from hub_release.repository.files import AUTO_MAPS, PACKAGE, ROOT, read_json
from hub_release.repository.tensors import stored_tensors, variant_of


PAGE = ROOT / "examples" / "assets" / "page.png"
QUESTION = "what is the code on the blue circle?"
TIMEOUT = 3600.0
# any checkpoint zooms so: a gate that is open for everything, and a region wherever its map is highest
ZOOMED = {"gate_threshold": 0.0, "region_threshold": 0.6, "region_threshold_mode": "peak", "max_new_tokens": 8}


def needed_packages(folder: Path) -> tuple[str, ...]:
    """What has to be installed to load the folder."""
    config = read_json(folder / "config.json")
    packages: tuple[str, ...] = PACKAGES
    if "bit" in variant_of(config, stored_tensors(folder)) or config.get("quantization_config"):
        packages += ("accelerate", "bitsandbytes")
    return packages + (("accelerate", "peft") if config.get("lora_subfolder") else ())


def judge(result: dict[str, Any], folder: Path) -> list[str]:
    """What is wrong with a folder by what a clean process says about it, one sentence each.

    Args:
        result: what `probe` returned.
    """
    wrong = [f"answers differ: {difference}" for difference in disagreements(result["answers"])]
    if PACKAGE.name in result["present"]:
        wrong.append(f"{PACKAGE.name} can be imported in that environment, so loading there proves nothing")
    if result["answers"]["AutoModel"]["box"] is None:
        wrong.append("the model did not zoom with its gate open and its region at the map's peak")
    if result["auto_map"] != AUTO_MAPS["config.json"]:
        wrong.append(f"a saved copy has another auto_map: {result['auto_map']}")
    if result["code"] != [path.name for path in code_files(folder)[0]]:
        wrong.append(f"a saved copy has other code files: {result['code']}")
    return wrong


def _cause(error: Exception) -> str:
    """What went wrong at last, of what a process said."""
    return str(error).strip().splitlines()[-1]


def check_loading(
    folder: Path,
    python: str | Path | None = None,
    base_folder: str | Path | None = None,
    timeout: float = TIMEOUT,
) -> list[str]:
    """Loads a folder where our package is not, and asks it the same question in every way.

    Args:
        python: an interpreter; by default that of a virtual environment made now.
        base_folder: where an add-on's base model is.
        timeout: seconds that loading and asking may take.

    Returns:
        What was wrong, one sentence each.

    Raises:
        BuildError: the environment could not be made, or the folder could not be loaded or asked in it.
    """
    is_addon = variant_of(read_json(folder / "config.json"), stored_tensors(folder)) == "addon"
    if is_addon and base_folder is None:
        raise BuildError("an add-on is proven together with its base model; say where that is with --base-folder")
    options = {"base_model_name_or_path": str(Path(base_folder).resolve())} if is_addon and base_folder else {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            where = python or make_environment(Path(scratch) / "environment", needed_packages(folder))
        except RuntimeError as error:
            raise BuildError(f"no clean environment could be made; name one with --python. {_cause(error)}") from error
        try:
            result = probe(
                folder, PAGE, QUESTION, python=where, options=ZOOMED, model_options=options, timeout=timeout
            )
        except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
            raise BuildError(f"it cannot be used there: {_cause(error)}") from error
    return judge(result, folder)


def verify(
    folder: str | Path,
    *,
    python: str | Path | None = None,
    base_folder: str | Path | None = None,
    timeout: float = TIMEOUT,
    tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Everything that keeps a folder from being published.

    Args:
        python, base_folder, timeout: as `check_loading` takes them.
        tell: takes a line about every check that has ended.

    Returns:
        One sentence for each thing that is wrong; none if the folder is right.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    problems: list[str] = []

    def note(name: str, findings: list[str]) -> None:
        problems.extend(findings)
        tell(f"{name:10} {'right' if not findings else f'wrong ({len(findings)})'}")
        for problem in findings:
            tell(f"  - {problem}")

    for name, findings in check_folder(folder).items():
        note(name, findings)
    if problems:
        tell("loading    not tried before the above is right")
        return problems
    try:
        note("loading", check_loading(folder, python, base_folder, timeout))
    except BuildError as error:
        note("loading", [str(error)])
        tell(str(error.__cause__ or ""))
    return problems


def add_environment_options(parser: argparse.ArgumentParser) -> None:
    """Where to load the folder; shared with `push.py`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--python", metavar="FILE", help="interpreter of an environment without this package")
    where.add_argument(
        "--here", action="store_const", const=sys.executable, dest="python", help="use this interpreter"
    )
    parser.add_argument("--base-folder", type=Path, metavar="FOLDER", help="where an add-on's base is on this machine")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="for loading and asking")


def environment_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What `add_environment_options` has added, as arguments of `verify`."""
    return {name: getattr(parsed, name) for name in ("python", "base_folder", "timeout")}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what build.py made")
    add_environment_options(parser)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()  # what transformers would report is told below
    logging.disable_progress_bar()
    problems = verify(options.folder, **environment_options(options), tell=print)
    print(f"verdict: {options.folder} " + (f"is refused: {problems[0]}" if problems else "can be published"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
