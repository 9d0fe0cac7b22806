"""Add-ons: folders that hold the branches, and perhaps a LoRA adapter, but not the VLM they belong to."""

import contextlib
import copy
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file, is_accelerate_available, is_peft_available

from .errors_qzoom import CheckpointError
from .loading_fingerprints_qzoom import FINGERPRINT, base_fingerprint, check_base, check_base_weights
from .loading_quantized_qzoom import aligned, dense_state, execution_device, is_quantized, vlm_recipe
from .loading_weight_files_qzoom import (
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    check_weight_files,
    damage_named,
    files_in_index,
    tensor_names,
)
from .saving_qzoom import ADAPTER, ADDON, check_target, staged


LORA_FOLDER = "lora"  # not the root, where transformers would take the whole folder for an adapter
_HUB_KEYWORDS = ("token", "cache_dir", "local_files_only", "proxies", "force_download")
_MOVED = (
    "If the base model has moved, say where it is: from_pretrained(…, base_model_name_or_path=…), or change "
    "base_model_name_or_path in the add-on's config.json."
)


# --- loading -------------------------------------------------------------------------------------------------------


def holds_only_branches(checkpoint_files: list[str]) -> bool:
    """Whether the files are those of an add-on."""
    for file in checkpoint_files:
        if not file.endswith(".safetensors"):
            return False
        if any(not key.startswith("zoom.") for key in tensor_names(file)):
            return False
    return True


def _base_files(base: str, **hub: Any) -> list[str]:
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
            f"the configuration of the base model {base!r} cannot be read: {' '.join(str(error).split())}"
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
    hub = {key: load_config.download_kwargs.get(key) for key in _HUB_KEYWORDS}
    hub = {key: value for key, value in hub.items() if value is not None}
    hub["revision"] = model.config.base_model_revision
    base_files = _base_files(base, **hub)
    files = [*checkpoint_files, *base_files]
    weight_map: dict[str, str] = {}
    for file in files:
        keys = tensor_names(file)
        if file not in checkpoint_files and any(key.startswith("zoom.") for key in keys):
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
    check_base_weights(base, _fingerprint_in(checkpoint_files), base_files)
    return files, replace(load_config, sharded_metadata={"weight_map": weight_map})


def load_lora(model: PreTrainedModel, name: str | os.PathLike[str], subfolder: str = "", **hub: Any) -> None:
    """Puts the LoRA adapter of an add-on around the weights it belongs to.

    Unlike transformers' own `load_adapter`, adapters of offloaded layers get their values, and keep their dtype.

    Raises:
        ImportError: peft is missing.
        ValueError: weights of the adapter are missing, damaged or have no place.
    """
    if not is_peft_available():
        raise ImportError("this add-on comes with a LoRA adapter, which needs peft: pip install peft")
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    folder = "/".join(part for part in (subfolder, model.config.lora_subfolder) if part)
    config_file, weights_file = (
        cached_file(name, file, subfolder=folder, **hub) for file in ("adapter_config.json", ADAPTER_WEIGHTS)
    )
    check_weight_files([weights_file])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(PeftConfig.from_pretrained(os.path.dirname(config_file)), model)
    weights = {key.removeprefix("base_model.model."): weight for key, weight in load_file(weights_file).items()}
    dtype = next(iter(weights.values())).dtype
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            device = execution_device(layer.get_base_layer())
            for key, child in layer.named_children():
                if key.startswith("lora_"):
                    child.to(dtype).to_empty(device=device)  # peft has put it on "meta" where the layer is offloaded
    result = set_peft_model_state_dict(model, weights)
    lost = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
    if lost:
        raise CheckpointError(f"{name}: LoRA weights are missing or have no place: {lost[:4]}")
    for parameter in trainable:  # peft has frozen them
        parameter.requires_grad_(True)
    model._hf_peft_config_loaded = True  # transformers' switches for adapters ask for it
    model.eval()


# --- saving --------------------------------------------------------------------------------------------------------


def _plain_vlm(model: PreTrainedModel) -> PreTrainedModel:
    """The VLM without a wrapper of peft."""
    return model.vlm.get_base_model() if hasattr(model.vlm, "get_base_model") else model.vlm


def check_vlm_unchanged(model: PreTrainedModel, base: str, revision: str | None) -> Any:
    """Compares the VLM with its base, one module in memory at a time.

    Quantized weights cannot be trained and are not compared; neither are LoRA weights.

    Returns:
        The base's quantization recipe, None for a base in 16 or 32 bit.

    Raises:
        CheckpointError: the base cannot be read, or the VLM differs from it.
    """
    with tempfile.TemporaryDirectory() as scratch, damage_named(base, revision=revision):
        try:
            config = AutoConfig.from_pretrained(base, revision=revision)
            placement = {}
            if is_accelerate_available() and getattr(config, "quantization_config", None) is None:
                placement = {"device_map": {"": "disk"}, "offload_folder": scratch}
            reference = AutoModelForImageTextToText.from_pretrained(base, revision=revision, **placement)
        except OSError as error:
            raise CheckpointError(
                f"the base model {base!r} cannot be read, so that nobody can tell whether this VLM still equals it: "
                f"{error} Pass save_addon(…, base_model_name_or_path=…), or save everything with save_pretrained."
            ) from error
        changed = _changed_weights(_plain_vlm(model), reference)
        recipe = getattr(reference.config, "quantization_config", None)
    if changed:
        raise CheckpointError(
            f"an add-on holds the branches only, but {len(changed)} weights of this VLM differ from {base!r}, e.g. "
            f"{changed[0]}: it was fully fine-tuned, or a LoRA was merged into it. Save everything with "
            "save_pretrained, or keep the LoRA unmerged (model.unmerge_adapter() of peft undoes merge_adapter())."
        )
    return recipe


def _changed_weights(vlm: nn.Module, reference: nn.Module) -> list[str]:
    originals = dict(reference.named_modules())
    nothing = nn.Module()
    changed = []
    for name, module in vlm.named_modules():
        if "lora_" in name:
            continue
        plain_name = name.replace(".base_layer", "")  # where LoRA wraps a layer
        original = originals.get(plain_name, nothing)
        with aligned(module), aligned(original):
            for key, parameter in module.named_parameters(recurse=False):
                other = getattr(original, key, None)
                if is_quantized(parameter) or (other is not None and is_quantized(other)):
                    continue
                if other is None or not torch.equal(parameter.cpu(), other.to("cpu", parameter.dtype)):
                    changed.append(f"{plain_name}.{key}")
    return changed


def _adapter_of(model: PreTrainedModel) -> tuple[nn.Module, str, tuple[str, Any]] | None:
    """(module that holds the adapter, prefix of its names in the model, its name and configuration), None without."""
    for owner, prefix in ((model, ""), (_plain_vlm(model), "vlm.")):
        adapters = getattr(owner, "peft_config", None)
        if not adapters:
            continue
        if len(adapters) > 1:
            raise CheckpointError(f"the model carries several adapters {sorted(adapters)}; keep one (delete_adapter).")
        return owner, prefix, next(iter(adapters.items()))
    return None


def has_unmerged_lora(model: PreTrainedModel) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def lora_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], Any] | None:
    """An unmerged LoRA adapter.

    Returns:
        Its weights by their name in the file, and its `LoraConfig`, which names the adapted modules one by one so that
        it means the same wherever it is loaded; None without an adapter.

    Raises:
        CheckpointError: several adapters, another kind of adapter, a merged one, or one that trains whole VLM weights.
    """
    found = _adapter_of(model) if has_unmerged_lora(model) else None
    if found is None:
        return None
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    owner, prefix, (adapter, lora_config) = found
    if str(getattr(lora_config.peft_type, "value", lora_config.peft_type)) != "LORA":
        raise CheckpointError(f"only LoRA adapters can go into an add-on, not {lora_config.peft_type}.")
    layers = {name: module for name, module in owner.named_modules() if isinstance(module, BaseTunerLayer)}
    if any(module.merged for module in layers.values()):
        raise CheckpointError(
            "the LoRA adapter is merged; call unmerge_adapter() first, or save_pretrained everything."
        )
    weights = get_peft_model_state_dict(owner, adapter_name=adapter, save_embedding_layers=False)
    whole = sorted(name for name in weights if "lora_" not in name and not f"{prefix}{name}".startswith("zoom."))
    if whole:
        raise CheckpointError(
            f"the adapter also trains whole weights of the VLM ({whole[0]}, …), which an add-on does not hold: merge "
            "it (model.merge_lora()) and save everything with save_pretrained."
        )
    named = {f"base_model.model.{prefix}{name}": weight.contiguous() for name, weight in weights.items()}
    named = {name: weight for name, weight in named.items() if "lora_" in name}
    lora_config = copy.deepcopy(lora_config)
    lora_config.target_modules = sorted(prefix + name for name in layers)
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        setattr(lora_config, name, None)
    lora_config.inference_mode = True
    return named, lora_config


def branch_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The branches' own weights, dense, under the names of a model without an adapter."""
    state: dict[str, Tensor] = {}
    for name, weight in dense_state(model.zoom, model.dtype).items():
        name = name.replace(".base_layer.", ".")
        if "lora_" in name or name.startswith("original_module."):
            continue
        if name.startswith("modules_to_save."):  # peft's copy that is trained, by adapter
            name = name.split(".", 2)[2]
        state[f"zoom.{name}"] = weight.contiguous()
    return state


def write_addon(
    model: PreTrainedModel, folder: Path, base: str, base_revision: str | None, auto_map: dict[str, str]
) -> None:
    """Checks that an add-on can stand for this model, and writes it: weights, configurations and code.

    Args:
        auto_map: class references for config.json.

    Raises:
        CheckpointError: as `lora_state` and `check_vlm_unchanged`, or the folder holds something else; nothing is
            written then.
    """
    model.config.check_fields()
    check_target(folder, ADDON, (base, model.config.base_model_name_or_path, model.config.vlm_config._name_or_path))
    lora = lora_state(model)
    if lora is not None:
        check_target(folder / LORA_FOLDER, ADAPTER, (base,))
    recipe = check_vlm_unchanged(model, base, base_revision)
    branches = branch_state(model)
    metadata = {"format": "pt"}
    with contextlib.suppress(ValueError):  # a base in another format can only be compared in memory, as above
        metadata[FINGERPRINT] = base_fingerprint(_base_files(base, revision=base_revision))
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if recipe is not None:
        config.quantization_config = vlm_recipe(recipe)
    config.base_model_name_or_path, config.base_model_revision = base, base_revision
    config.lora_subfolder = None if lora is None else LORA_FOLDER
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.auto_map = dict(auto_map)
    with staged(folder) as target:
        save_file(branches, target / WEIGHTS, metadata=metadata)
        if model.is_remote_code():
            custom_object_save(model, target)
        config.save_pretrained(target)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(target)
        if lora is not None:
            weights, lora_config = lora
            lora_config.base_model_name_or_path = base
            (target / LORA_FOLDER).mkdir()
            lora_config.save_pretrained(target / LORA_FOLDER)
            save_file(weights, target / LORA_FOLDER / ADAPTER_WEIGHTS, metadata={"format": "pt"})
