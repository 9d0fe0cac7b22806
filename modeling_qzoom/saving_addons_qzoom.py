"""Saving add-ons: what a model adds to its base, once its VLM is seen to be the base's still."""

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_accelerate_available

from .errors_qzoom import CheckpointError
from .loading_addons_qzoom import base_files
from .loading_fingerprints_qzoom import FINGERPRINT, base_fingerprint
from .loading_lora_qzoom import lora_state, plain_vlm
from .loading_quantized_qzoom import aligned, dense_state, is_quantized, vlm_recipe
from .loading_weight_files_qzoom import ADAPTER_WEIGHTS, WEIGHTS, damage_named
from .saving_qzoom import ADAPTER, ADDON, check_target, staged


LORA_FOLDER = "lora"  # not the root, where transformers would take the whole folder for an adapter


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
        changed = _changed_weights(plain_vlm(model), reference)
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


def branch_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The branches' and the router's weights, dense, under the names of a model without an adapter."""
    state = _own_state(model.zoom, "zoom", model.dtype)
    return state if model.visor is None else {**state, **_own_state(model.visor, "visor", model.dtype)}


def _own_state(module: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, weight in dense_state(module, dtype).items():
        name = name.replace(".base_layer.", ".")
        if "lora_" in name or name.startswith("original_module."):
            continue
        if name.startswith("modules_to_save."):  # peft's copy that is trained, by adapter
            name = name.split(".", 2)[2]
        state[f"{prefix}.{name}"] = weight.contiguous()
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
        metadata[FINGERPRINT] = base_fingerprint(base_files(base, revision=base_revision))
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
