"""LoRA adapters of add-ons: put around the weights they belong to, and taken off them for a file."""

import copy
import os
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file, is_peft_available

from .errors_qzoom import CheckpointError
from .loading_names_qzoom import OWN_WEIGHTS
from .loading_quantized_qzoom import execution_device
from .loading_weight_files_qzoom import ADAPTER_WEIGHTS, check_weight_files


def has_unmerged_lora(model: PreTrainedModel) -> bool:
    """Whether a model carries LoRA weights that are not added to its own."""
    return any("lora_" in name for name, _ in model.named_parameters())


def plain_vlm(model: PreTrainedModel) -> PreTrainedModel:
    """The VLM without a wrapper of peft."""
    return model.vlm.get_base_model() if hasattr(model.vlm, "get_base_model") else model.vlm


def load_lora(model: PreTrainedModel, name: str | os.PathLike[str], subfolder: str = "", **hub: Any) -> None:
    """Puts the LoRA adapter of an add-on around the weights it belongs to.

    Unlike transformers' own `load_adapter`, adapters of offloaded layers get their values, and keep their dtype.

    Raises:
        ImportError: peft is missing.
        CheckpointError: weights of the adapter are missing, damaged or have no place.
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


def _adapter_of(model: PreTrainedModel) -> tuple[nn.Module, str, tuple[str, Any]] | None:
    """(module that holds the adapter, prefix of its names in the model, its name and configuration), None without."""
    for owner, prefix in ((model, ""), (plain_vlm(model), "vlm.")):
        adapters = getattr(owner, "peft_config", None)
        if not adapters:
            continue
        if len(adapters) > 1:
            raise CheckpointError(f"the model carries several adapters {sorted(adapters)}; keep one (delete_adapter).")
        return owner, prefix, next(iter(adapters.items()))
    return None


def lora_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], Any] | None:
    """An unmerged LoRA adapter.

    Returns:
        Its weights by their name in the file, and its `LoraConfig`, which names the adapted modules one by one so that
        it means the same wherever it is loaded; None without an adapter.

    Raises:
        CheckpointError: several adapters, another kind of adapter, a merged one, or one that trains whole VLM weights.
    """
    carried = _adapter_of(model) if has_unmerged_lora(model) else None
    if carried is None:
        return None
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    owner, prefix, (adapter, lora_config) = carried
    if str(getattr(lora_config.peft_type, "value", lora_config.peft_type)) != "LORA":
        raise CheckpointError(f"only LoRA adapters can go into an add-on, not {lora_config.peft_type}.")
    layers = {name: module for name, module in owner.named_modules() if isinstance(module, BaseTunerLayer)}
    if any(module.merged for module in layers.values()):
        raise CheckpointError(
            "the LoRA adapter is merged; call unmerge_adapter() first, or save_pretrained everything."
        )
    weights = get_peft_model_state_dict(owner, adapter_name=adapter, save_embedding_layers=False)
    whole = sorted(name for name in weights if "lora_" not in name and not f"{prefix}{name}".startswith(OWN_WEIGHTS))
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
