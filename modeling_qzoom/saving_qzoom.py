"""Saving into a folder without destroying what is in it: refused where it is another model's, whole or not at all."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors_qzoom import CheckpointError
from .loading_names_qzoom import OWN_WEIGHTS
from .loading_weight_files_qzoom import tensor_names


FULL, ADDON, ADAPTER = "a full Q-Zoom checkpoint", "a Q-Zoom add-on", "a LoRA adapter"
# names that transformers gives to weights and their index; a variant ("fp16") stands before what is numbered
_WEIGHTS = re.compile(
    r"model(?P<a>\.[\w-]+?)?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?P<b>\.[\w-]+)?\.json"
)
# weights in formats that this package never writes
_FOREIGN = re.compile(
    r"(pytorch_model|tf_model|flax_model|consolidated|adapter_model).*\.(bin|pth?|h5|msgpack)|.+\.gguf"
)


def _is_same(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one folder, however they are written."""
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them is not there
        return False


def _stored_tensors(folder: Path) -> set[str] | None:
    """Names of all tensors in a folder's weights, None without weights; what is damaged counts as empty."""
    files = [path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and path.suffix == ".safetensors"]
    names: set[str] = set()
    for path in files:
        with contextlib.suppress(ValueError):
            names.update(tensor_names(path, whole=False))
    return names if files else None


def what_is_in(folder: Path) -> str | None:
    """What a folder holds, in words; None where nothing is in it that saving a model would overwrite."""
    if not folder.is_dir():
        return None
    config = folder / "config.json"
    if config.exists():
        try:
            model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            return "a config.json that cannot be read"
        if model_type != "qzoom":
            return "another model's config.json" if model_type is None else f"a plain {model_type!r} model"
    if (folder / "adapter_config.json").exists():
        return ADAPTER
    for path in sorted(folder.iterdir()):
        if _FOREIGN.fullmatch(path.name):
            return f"the weights of another model ({path.name})"
    names = _stored_tensors(folder)
    if not names:  # a damaged file beside our own configuration is what an earlier save left
        return None if names is None or config.exists() else "weights that cannot be read"
    if not any(name.startswith(OWN_WEIGHTS) for name in names):
        return "the weights of another model"
    return ADDON if all(name.startswith(OWN_WEIGHTS) for name in names) else FULL


def check_target(folder: str | os.PathLike[str], kind: str, bases: Iterable[str | None] = ()) -> None:
    """Refuses a folder in which something else than an earlier save of the same kind would be overwritten.

    Args:
        kind: what is to be saved: `FULL`, `ADDON` or `ADAPTER`.
        bases: names or folders of the model that it was made from.

    Raises:
        CheckpointError: says what is there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder to save to.")
    if any(base is not None and _is_same(base, folder) for base in bases):
        raise CheckpointError(
            f"{folder} is the folder of the base model, whose weights would be overwritten; choose another folder."
        )
    content = what_is_in(folder)
    if content not in (None, kind):
        raise CheckpointError(
            f"{folder} holds {content}, which {kind} would overwrite or be mixed with; choose another folder, or "
            "empty this one first."
        )


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside the final files to write to; at the end they take their places, and old weights go.

    What is interrupted before leaves the old files as they were. Links in the folder are replaced, never written
    through.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            yield Path(scratch)
            _move(Path(scratch), folder)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # unless something is in it
                folder.rmdir()
        raise


def _move(source: Path, folder: Path) -> None:
    files = [path for path in source.rglob("*") if not path.is_dir()]
    # the configuration, which says what the rest is, comes last
    for path in sorted(files, key=lambda path: (path.name == "config.json", path)):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    written = {
        path.name: _variant(path.name) for path in files if path.parent == source and _WEIGHTS.fullmatch(path.name)
    }
    for path in folder.iterdir():
        # transformers prefers one file to shards, and others the index: nothing of an earlier save may stay
        if path.name not in written and _WEIGHTS.fullmatch(path.name) and _variant(path.name) in written.values():
            path.unlink()


def _variant(name: str) -> str:
    match = _WEIGHTS.fullmatch(name)
    return "" if match is None else match["a"] or match["b"] or ""
