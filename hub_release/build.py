"""Builds a loadable folder from a checkpoint's data and the package's code: `build.py CHECKPOINT OUTPUT`.

CHECKPOINT holds data only (weights, configurations, tokenizer, card). OUTPUT gets that data, the code that the model's
classes need, the references to it (`auto_map`), and the repository's licence. Needs the standard library only.
"""

import argparse
import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_qzoom"
MODEL_CLASS = "modeling_qzoom.QZoomForConditionalGeneration"
# the classes that each of these files has to name
AUTO_MAPS: dict[str, dict[str, str]] = {
    "config.json": {
        "AutoConfig": "configuration_qzoom.QZoomConfig",
        "AutoModel": MODEL_CLASS,
        "AutoModelForImageTextToText": MODEL_CLASS,
        "AutoModelForMultimodalLM": MODEL_CLASS,
    },
    "processor_config.json": {"AutoProcessor": "processing_qzoom.QZoomProcessor"},
}
CODE_ROOTS = ("configuration_qzoom", "modeling_qzoom", "processing_qzoom")
LICENCE_FILES = ("LICENSE", "NOTICE")


class BuildError(ValueError):
    """The checkpoint or the output folder is not what it should be; the message says what to do."""


def published_files(package: Path = PACKAGE) -> list[Path]:
    """The package's modules that the published classes import, directly or through others."""
    found: dict[str, Path] = {}
    pending = list(CODE_ROOTS)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found[name] = package / f"{name}.py"
        for node in ast.walk(ast.parse(found[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                if node.level > 1 or not node.module or "." in node.module:
                    raise BuildError(f"{name}.py: a published file may only import modules beside it by name.")
                pending.append(node.module)
    return [found[name] for name in sorted(found)]


def weight_names(checkpoint: Path) -> set[str]:
    """Names of all tensors in the folder's safetensors files.

    Raises:
        BuildError: no weights, or a listed file is missing or damaged.
    """
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    names: set[str] = set()
    for file in files:
        path = checkpoint / file
        if not path.exists():
            raise BuildError(f"{checkpoint} has no weights ({file} is missing); train or convert a checkpoint first.")
        try:
            with path.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (ValueError, OverflowError, MemoryError) as error:
            raise BuildError(f"{path} is not a safetensors file: {error}") from error
        names |= set(header) - {"__metadata__"}
    return names


def _check_checkpoint(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise BuildError(f"{checkpoint} is not a folder.")
    config = checkpoint / "config.json"
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.exists() else None
    if model_type != "qzoom":
        raise BuildError(f"{config} is missing or not that of a Q-Zoom checkpoint (model_type {model_type!r}).")
    if not any(name.startswith("zoom.") for name in weight_names(checkpoint)):
        raise BuildError(f"the weights in {checkpoint} hold no branches (zoom.*): this is a plain model.")


def _with_auto_map(path: Path, references: dict[str, str]) -> None:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = {**content.get("auto_map", {}), **references}
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def build(checkpoint: str | Path, output: str | Path, *, force: bool = False) -> Path:
    """Makes a folder that loads with `trust_remote_code=True` where the package is not installed.

    Args:
        checkpoint: folder with the data of a full checkpoint or an add-on.
        output: absent or empty, unless `force`; then what is in it is replaced.

    Returns:
        The output folder.

    Raises:
        BuildError: no weights, no Q-Zoom configuration, or an output folder that is in use.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    _check_checkpoint(checkpoint)
    if output.resolve() == checkpoint.resolve() or checkpoint.resolve().is_relative_to(output.resolve()):
        raise BuildError(f"{output} is or contains the checkpoint itself; choose another folder.")
    if output.exists() and not output.is_dir():
        raise BuildError(f"{output} is a file.")
    if output.exists() and any(output.iterdir()):
        if not force:
            raise BuildError(
                f"{output} is not empty; choose another folder, or pass --force to replace what is in it."
            )
        shutil.rmtree(output)
    shutil.copytree(checkpoint, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", ".*", "__pycache__"))
    for file in published_files():
        shutil.copyfile(file, output / file.name)
    for name in LICENCE_FILES:
        if (ROOT / name).exists():
            shutil.copyfile(ROOT / name, output / name)
    for name, references in AUTO_MAPS.items():
        if (output / name).exists():
            _with_auto_map(output / name, references)
    return output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder with a checkpoint's data")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace what OUTPUT holds")
    options = parser.parse_args(arguments)
    try:
        folder = build(options.checkpoint, options.output, force=options.force)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"built {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
