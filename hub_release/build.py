"""Builds a Hub repository from a checkpoint's data and the package's code: `build.py CHECKPOINT OUTPUT`.

CHECKPOINT holds data only: weights, configurations, tokenizer, card, and in `evaluation/` what was measured. OUTPUT
gets that data, the code that the model's classes need, the references to it (`auto_map`), licences, and a model card
made from all of it. `verify.py OUTPUT` proves what came out.

The plain build needs the standard library only. `--variant`, `--tokenizer` and `--max-shard-size` use the library.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


# called as a file, Python looks for packages beside it; ours are one folder up
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub_release.card.card import render
from hub_release.card.facts import read_facts
from hub_release.card.parts import Card, read_card
from hub_release.repository.code import published_files
from hub_release.repository.errors import BuildError
from hub_release.repository.files import (
    AUTO_MAPS,
    BASE_LICENCE,
    ENDPOINT,
    ENDPOINT_FILES,
    LICENCE_FILES,
    ROOT,
    VERSION_FIELD,
    WEIGHT_FILES,
    files_of,
    is_data,
    is_licence,
    package_version,
    read_json,
)
from hub_release.repository.tensors import stored_tensors


VARIANTS = ("full", "addon", "4bit")
_MODEL_FILES = ("config.json", "generation_config.json")


def _check_checkpoint(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise BuildError(f"{checkpoint} is not a folder.")
    config = checkpoint / "config.json"
    model_type = read_json(config).get("model_type") if config.exists() else None
    if model_type != "qzoom":
        raise BuildError(f"{config} is missing or not that of a Q-Zoom checkpoint (model_type {model_type!r}).")
    if not any(name.startswith("zoom.") for name in stored_tensors(checkpoint)):
        raise BuildError(f"the weights in {checkpoint} hold no branches (zoom.*): this is a plain model.")


def _is_built(folder: Path) -> bool:
    """Whether a folder looks like what this command makes, and like nothing else."""
    names = ("README.md", "modeling_qzoom.py", *LICENCE_FILES)
    config = folder / "config.json"
    if not config.exists() or not all((folder / name).exists() for name in names) or (folder / ".git").exists():
        return False
    return read_json(config).get("model_type") == "qzoom"


def _check_output(sources: Iterable[Path], output: Path, force: bool) -> None:
    """Refuses to replace anything but an earlier repository."""
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()) or (output.exists() and output.samefile(source)):
            what = "the checkpoint itself, or a folder that is read"
            raise BuildError(f"{output} is or contains {what}; choose another folder.")
    if output.exists() and not output.is_dir():
        raise BuildError(f"{output} is a file.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise BuildError(f"{output} is not empty; choose another folder, or pass --force to replace what is in it.")
    if not _is_built(output):
        raise BuildError(
            f"{output} holds something else than a repository that was built before, and --force would delete it; "
            "choose another folder, or empty this one first."
        )


def _check_tokenizer(checkpoint: Path, tokenizer: Path) -> None:
    if not tokenizer.is_dir():
        raise BuildError(f"--tokenizer {tokenizer} is not a folder.")
    if (checkpoint / "processor_config.json").exists():
        raise BuildError(f"{checkpoint} has a processor and a tokenizer of its own; leave --tokenizer out.")


def left_out(checkpoint: Path) -> list[str]:
    """Files of a checkpoint that do not belong into a repository, such as a trainer's state; code is replaced."""
    return [name for name in files_of(checkpoint) if not is_data(name) and not name.endswith((".py", ".pyc"))]


def _copy(source: Path, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target)


def _copy_licences(folder: Path, output: Path) -> None:
    """A model's own terms, beside those of the code."""
    ours = {(ROOT / name).read_bytes() for name in LICENCE_FILES}
    for name in files_of(folder):
        if is_licence(name) and (folder / name).read_bytes() not in ours:
            _copy(folder, name, output / f"{BASE_LICENCE}{name}")


def _change_json(path: Path, **fields: Any) -> None:
    content = {**read_json(path), **fields}
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_base(checkpoint: Path, output: Path, base: str | None) -> None:
    """Names the base model as others reach it, wherever it was read from here."""
    recorded = read_json(checkpoint / "config.json")
    name = base or recorded.get("base_model_name_or_path")
    if name is not None:
        # a revision belongs to the name that it was recorded with
        is_same = name == recorded.get("base_model_name_or_path")
        revision = recorded.get("base_model_revision") if is_same else None
        _change_json(output / "config.json", base_model_name_or_path=name, base_model_revision=revision)


def _add_references(output: Path) -> None:
    for name, references in AUTO_MAPS.items():
        if (output / name).exists():
            others = read_json(output / name).get("auto_map") or {}
            _change_json(output / name, auto_map={**others, **references})


def _write_card(output: Path, name: str, licence: str | None) -> None:
    path = output / "README.md"
    card = read_card(path.read_text(encoding="utf-8")) if path.exists() else Card()
    path.write_text(render(card, read_facts(output, name), licence), encoding="utf-8")


def _write_with_library(
    checkpoint: Path,
    folder: Path,
    variant: str,
    tokenizer: Path | None,
    base: str | None,
    base_folder: Path | None,
    max_shard_size: str | None,
) -> None:
    """Writes what is not copied from the checkpoint: other weights, a processor; nothing for the plain build."""
    rewrites = variant != "full" or max_shard_size is not None
    if tokenizer is None and not rewrites:
        return
    # here and not at the top: the plain build needs the standard library only
    from hub_release.repository.variants import write_processor, write_variant

    if tokenizer is not None:
        write_processor(checkpoint, tokenizer, folder)
    if rewrites:
        write_variant(checkpoint, folder, variant, base=base, base_folder=base_folder, max_shard_size=max_shard_size)


def _copy_data(checkpoint: Path, made: Path, output: Path) -> None:
    """The data of a checkpoint, with what was made anew in the place of its own."""
    fresh = files_of(made)
    # weights in other files, and what describes them
    is_rewritten = any(WEIGHT_FILES.fullmatch(name) for name in fresh)
    for name in filter(is_data, files_of(checkpoint)):
        is_replaced = is_rewritten and (name in _MODEL_FILES or WEIGHT_FILES.fullmatch(name))
        if name not in LICENCE_FILES and not is_replaced:
            _copy(checkpoint, name, output / name)
    for name in filter(is_data, fresh):
        _copy(made, name, output / name)


def _copy_code(output: Path) -> None:
    """The package's published files and their licence."""
    for file in published_files():
        _copy(file.parent, file.name, output / file.name)
    for name in LICENCE_FILES:
        _copy(ROOT, name, output / name)


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    variant: str = "full",
    tokenizer: str | Path | None = None,
    base: str | None = None,
    base_folder: str | Path | None = None,
    licence: str | None = None,
    max_shard_size: str | None = None,
    handler: bool = False,
) -> Path:
    """Makes a folder that loads with `trust_remote_code=True` where the package is not installed.

    Args:
        checkpoint: folder with the data of a full checkpoint or an add-on.
        output: absent or empty, unless `force`; then a repository that was built there before is replaced, once the
            new one is whole.
        variant: "full", what the checkpoint holds; "addon", the branches only; "4bit", nf4 with double quantization.
        tokenizer: folder with tokenizer and chat template, for a checkpoint that has none.
        base: name of the plain VLM on the Hub, by default the one that the checkpoint's config names.
        base_folder: where the plain VLM is on this machine: its licence is copied, and an add-on is compared with it.
        licence: identifier of the weights' licence for the card, by default the one in the checkpoint's card.
        max_shard_size: size of the largest weights file, e.g. "5GB"; by default weights are copied as they are.
        handler: add what a hosted endpoint needs to serve the repository.

    Returns:
        The output folder.

    Raises:
        BuildError: no weights, no Q-Zoom configuration, an output folder that is in use, or options that do not fit.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    base_folder = None if base_folder is None else Path(base_folder)
    _check_checkpoint(checkpoint)
    if base_folder is not None and not base_folder.is_dir():
        raise BuildError(f"--base-folder {base_folder} is not a folder.")
    if tokenizer is not None:
        _check_tokenizer(checkpoint, tokenizer)
    _check_output([folder for folder in (checkpoint, tokenizer, base_folder) if folder is not None], output, force)
    place = output.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # whole before anything of an earlier one goes
    with tempfile.TemporaryDirectory(prefix=".building-", dir=place.parent) as scratch:
        made, built = Path(scratch) / "made", Path(scratch) / "built"
        made.mkdir()
        built.mkdir()
        _write_with_library(checkpoint, made, variant, tokenizer, base, base_folder, max_shard_size)
        _copy_data(checkpoint, made, built)
        _copy_code(built)
        for name in ENDPOINT_FILES if handler else ():
            _copy(ENDPOINT, name, built / name)
        for folder in filter(None, (checkpoint, base_folder)):
            _copy_licences(folder, built)
        _name_base(checkpoint, built, base)
        _add_references(built)
        _change_json(built / "config.json", **{VERSION_FIELD: package_version()})
        _write_card(built, place.name, licence)
        if place.exists():
            shutil.rmtree(place)
        os.replace(built, place)
    return output


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with a checkpoint's data")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace what OUTPUT holds")
    parser.add_argument(
        "--variant", choices=VARIANTS, default="full", help="what the checkpoint holds, its branches only, or nf4"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer for a checkpoint without one")
    parser.add_argument("--base", metavar="OWNER/NAME", help="the plain VLM; default: what the checkpoint names")
    parser.add_argument("--base-folder", type=Path, metavar="FOLDER", help="where the plain VLM is on this machine")
    parser.add_argument("--license", dest="licence", metavar="ID", help="of the weights, e.g. apache-2.0")
    parser.add_argument("--max-shard-size", metavar="SIZE", help='split the weights, e.g. "5GB"')
    parser.add_argument("--handler", action="store_true", help="add handler.py, for hosted endpoints")
    options = vars(parser.parse_args(arguments))
    checkpoint, output = options.pop("checkpoint"), options.pop("output")
    try:
        folder = build(checkpoint, output, **options)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if dropped := left_out(checkpoint):
        print(f"left out, as no part of a repository: {', '.join(dropped)}")
    print(f"built {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
