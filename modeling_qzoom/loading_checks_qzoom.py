"""What is checked before and after a checkpoint is loaded: that it is one of ours, whole, and asked for rightly."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import find_adapter_config_file, is_peft_available

from .configuration_qzoom import QZoomConfig, own_fields
from .errors_qzoom import CheckpointError, InputError
from .hub_qzoom import hub_keywords
from .loading_names_qzoom import OWN_WEIGHTS
from .messages_qzoom import similar


_LIKENESS = 0.6  # every unknown field is refused, so the guess may be wide


def damage_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that `damage_named` takes."""
    return {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if kwargs.get(key) is not None}


def check_zoom_config(fields: dict[str, Any]) -> None:
    """Checks the names in the `zoom_config` of a call.

    Args:
        fields: values by name of the field.

    Raises:
        InputError: a key is no field of `QZoomConfig`.
    """
    known = own_fields() - {"vlm_config"}
    for key in sorted(set(fields) - known):
        close = similar(key, known, _LIKENESS)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {sorted(known)}."
        raise InputError(f"zoom_config has no field {key!r}{hint}")


def check_is_qzoom(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> str | None:
    """Makes sure, before anything is loaded, that a name is that of a Q-Zoom checkpoint or of an adapter of one.

    Returns:
        For an adapter of peft without a model beside it, the name of its base.

    Raises:
        CheckpointError: it is something else.
        ImportError: it is an adapter and peft is missing.
    """
    fields, _ = PreTrainedConfig.get_config_dict(name, **hub_keywords(kwargs, "subfolder"))
    if not isinstance(fields, dict):
        raise CheckpointError(f"config.json of {name} holds no JSON object.")
    base = None
    if not fields:
        file = find_adapter_config_file(os.fspath(name), **hub_keywords(kwargs, "subfolder"))
        if file is None:
            raise CheckpointError(f"{name} holds no config.json, so it is no checkpoint.")
        if not is_peft_available():
            raise ImportError(f"{name} holds an adapter, which needs peft: pip install peft")
        try:
            base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if not base:
            raise CheckpointError(
                f"{file} names no base model (base_model_name_or_path), so there is nothing to adapt."
            )
        hub = {key: value for key, value in hub_keywords(kwargs).items() if key != "revision"}
        fields, _ = PreTrainedConfig.get_config_dict(base, **hub)
    if fields.get("model_type") != QZoomConfig.model_type:
        place = str(name) if base is None else f"{base}, the base of the adapter in {name},"
        raise CheckpointError(
            f"{place} holds a plain {fields.get('model_type')!r} model, not a Q-Zoom checkpoint; attach fresh "
            "branches with QZoomForConditionalGeneration.from_backbone(name, branch_layer=…)."
        )
    return base


def check_loading_info(name: str, info: dict[str, Any]) -> None:
    """Refuses a checkpoint whose branches or VLM would be partly random.

    Args:
        info: transformers' report of the load.

    Raises:
        CheckpointError: names the weights.
    """
    for kind, meaning in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "holds unknown"),
        ("mismatched_keys", "holds wrongly shaped"),
    ):
        keys = [key[0] if isinstance(key, tuple) else key for key in info[kind]]
        wrong = sorted(key for key in keys if key.startswith(OWN_WEIGHTS))
        if wrong:
            raise CheckpointError(
                f"{name} {meaning} branch weights, so its branches would be random or incomplete: "
                f"{', '.join(wrong[:4])}{', …' if len(wrong) > 4 else ''} ({len(wrong)} in all). Check branch_layer, "
                "branch_depth and has_gate in its config, or attach fresh branches with from_backbone."
            )
    check_vlm_complete(name, info)


def check_vlm_complete(name: str, info: dict[str, Any]) -> None:
    """Checks that a load found all of the VLM's weights.

    Raises:
        CheckpointError: weights of the VLM are missing.
    """
    lost = sorted(key for key in info["missing_keys"] if not key.startswith(OWN_WEIGHTS))
    if lost:
        raise CheckpointError(f"{name} lacks {len(lost)} weights of the VLM, e.g. {lost[0]}; they would be random.")
