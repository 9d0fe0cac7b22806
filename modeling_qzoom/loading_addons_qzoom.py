"""Loading add-ons: folders that hold the branches, and perhaps a LoRA adapter, but not the VLM they belong to."""

import os
from dataclasses import replace
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from .errors_qzoom import CheckpointError
from .hub_qzoom import hub_keywords
from .loading_fingerprints_qzoom import FINGERPRINT, check_base, check_base_weights
from .loading_names_qzoom import OWN_WEIGHTS
from .loading_weight_files_qzoom import INDEX, WEIGHTS, files_in_index, tensor_names
from .messages_qzoom import one_line


_MOVED = (
    "If the base model has moved, say where it is: from_pretrained(…, base_model_name_or_path=…), or change "
    "base_model_name_or_path in the add-on's config.json."
)


def holds_only_branches(checkpoint_files: list[str]) -> bool:
    """Whether the files are those of an add-on."""
    for file in checkpoint_files:
        if not file.endswith(".safetensors"):
            return False
        if any(not key.startswith(OWN_WEIGHTS) for key in tensor_names(file)):
            return False
    return True


def base_files(base: str, **hub: Any) -> list[str]:
    """The safetensors files of the base model's repository or folder.

    Raises:
        CheckpointError: nothing is there, or the index is damaged.
    """
    missing_ok = {"_raise_exceptions_for_missing_entries": False}
    try:
        single = cached_file(base, WEIGHTS, **missing_ok, **hub)
        if single is not None:
            return [single]
        index = cached_file(base, INDEX, **missing_ok, **hub)
        if index is not None:
            return [cached_file(base, name, **hub) for name in files_in_index(index)]
    except OSError as error:
        raise CheckpointError(f"this add-on's base model {base!r} cannot be read: {error} {_MOVED}") from error
    raise CheckpointError(f"this add-on's base model {base!r} holds no model.safetensors. {_MOVED}")


def _fingerprint_in(checkpoint_files: list[str]) -> str | None:
    """What an add-on recorded about its base; None in one that is older than such records."""
    for file in checkpoint_files:
        with safe_open(file, "pt") as weights:
            fingerprint = (weights.metadata() or {}).get(FINGERPRINT)
        if fingerprint is not None:
            return fingerprint
    return None


def _check_sizes(model: PreTrainedModel, base: str, **hub: Any) -> None:
    if not PreTrainedConfig.get_config_dict(base, **hub)[0]:  # weights without a configuration
        return
    try:
        config = AutoConfig.from_pretrained(base, **hub)
    except Exception as error:  # transformers checks fields with classes of errors of its own
        raise CheckpointError(
            f"the configuration of the base model {base!r} cannot be read: {one_line(error)}"
        ) from error
    check_base(base, config, model.config.vlm_config)


def with_base_files(model: PreTrainedModel, checkpoint_files: list[str], load_config: Any) -> tuple[list[str], Any]:
    """An add-on's files and those of its base, so that one pass of transformers loads both.

    Args:
        load_config: transformers' `LoadStateDictConfig` of the add-on.

    Returns:
        The files, and a `load_config` that knows which file holds which weight (for offloading to disk).

    Raises:
        CheckpointError: the add-on names no base, the base cannot be found or is damaged, it holds branches of its
            own, or it is not the one that the add-on was made for.
    """
    base = model.config.base_model_name_or_path
    if base is None:
        raise CheckpointError(
            "the checkpoint holds branches only, and its config.json names no base model. Pass "
            "base_model_name_or_path=… to from_pretrained."
        )
    hub = {**hub_keywords(load_config.download_kwargs), "revision": model.config.base_model_revision}
    files_of_base = base_files(base, **hub)
    files = [*checkpoint_files, *files_of_base]
    weight_map: dict[str, str] = {}
    for file in files:
        keys = tensor_names(file)
        if file not in checkpoint_files and any(key.startswith(OWN_WEIGHTS) for key in keys):
            raise CheckpointError(
                f"the base model {base!r} is itself a Q-Zoom checkpoint, whose branches would replace the add-on's. "
                "Name the plain VLM, or load that checkpoint as it is."
            )
        packed = any(key.endswith((".absmax", ".SCB")) for key in keys)
        if packed and file not in checkpoint_files and getattr(model.config, "quantization_config", None) is None:
            raise CheckpointError(
                f"the base model {base!r} holds quantized weights, but this add-on was made for a dense one. Name the "
                "dense base, and pass quantization_config=… to quantize it while loading."
            )
        # transformers puts the folder of the first file before these names, which absolute ones ignore
        weight_map.update(dict.fromkeys(keys, os.path.abspath(file)))
    _check_sizes(model, base, **hub)
    check_base_weights(base, _fingerprint_in(checkpoint_files), files_of_base)
    return files, replace(load_config, sharded_metadata={"weight_map": weight_map})
