"""Whether a repository's weights are all that its configuration asks for, seen from the files' headers alone."""

import copy
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hub_release.repository.files import files_of, is_repository, read_json
from hub_release.repository.tensors import StoredTensor, stored_tensors, variant_of
from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration


# of weights that bitsandbytes has packed, and how many of them one byte holds
_PACKED = {"U8": 2, "I8": 1}
_INT8_COMPANIONS = ("SCB", "weight_format")


def _owner(name: str, stored: dict[str, StoredTensor]) -> str | None:
    """The packed weight that a tensor belongs to, such as its scales; None for a weight."""
    parts = name.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    if parts[-1] in _INT8_COMPANIONS:
        names.append(f"{names[0]}.weight")
    return next((owner for owner in names if owner in stored and stored[owner].dtype in _PACKED), None)


def _assign(config: QZoomConfig, names: dict[str, StoredTensor]) -> dict[str, Any]:
    """What transformers says to weights of these names and shapes; it sees stand-ins without values."""
    config = copy.deepcopy(config)
    config.lora_subfolder = None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = {name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta") for name, tensor in names.items()}
    # not by way of QZoomForConditionalGeneration, which stops at the first thing that is wrong
    _, info = PreTrainedModel.from_pretrained.__func__(
        QZoomForConditionalGeneration,
        None,
        config=config,
        state_dict=weights,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return info


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_packed(stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return any(prod(stored) * count == prod(expected) for count in _PACKED.values())


def _check_names(info: dict[str, Any], variant: str) -> Iterator[str]:
    """Weights that are missing, and those that the model has no place for."""
    for part, what in (("zoom.", "branch weights"), ("visor.", "weights of VISOR"), ("vlm.", "weights of the VLM")):
        missing = sorted(name for name in info["missing_keys"] if name.startswith(part))
        if missing and not (variant == "addon" and part == "vlm."):
            yield f"{what} are missing: {_some(missing)}"
    if info["unexpected_keys"]:
        yield f"weights that the model has no place for: {_some(sorted(info['unexpected_keys']))}"


def _check_shapes(info: dict[str, Any], variant: str) -> Iterator[str]:
    """Weights of other shapes than the model's, unless they are packed."""
    for name, stored, expected in sorted(info["mismatched_keys"]):
        if not ("bit" in variant and _is_packed(tuple(stored), tuple(expected))):
            yield f"{name} has the shape {tuple(stored)} instead of {tuple(expected)}"


def _check_base(base: str | None, is_addon: bool) -> Iterator[str]:
    """The base model's name is one that others can reach."""
    if base is None and is_addon:
        yield "config.json of this add-on names no base model; build with --base OWNER/NAME"
    elif base is not None and (not is_repository(base) or Path(base).exists()):
        yield f"config.json names the base model {base!r}, which others cannot reach; build with --base OWNER/NAME"


def check_weights(folder: Path) -> Iterator[str]:
    """All weights that the configuration asks for, in their shapes, and no others.

    Raises:
        BuildError: files or index are damaged.
    """
    fields, stored = read_json(folder / "config.json"), stored_tensors(folder)
    variant = variant_of(fields, stored)
    listed = {tensor.file for tensor in stored.values()}
    others = (name for name in files_of(folder) if name.endswith(".safetensors") and "/" not in name)
    yield from (
        f"{name} is read by nobody, or instead of what the index lists" for name in others if name not in listed
    )
    names = {name: tensor for name, tensor in stored.items() if _owner(name, stored) is None}
    try:
        info = _assign(QZoomConfig.from_pretrained(folder), names)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        yield f"config.json describes no model: {error}"
        return
    yield from _check_names(info, variant)
    yield from _check_shapes(info, variant)
    yield from _check_base(fields.get("base_model_name_or_path"), variant == "addon")
