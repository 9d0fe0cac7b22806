"""Quantized models: what stays in 16 bit, recipes of pre-quantized VLMs, and dense copies of quantized weights."""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_accelerate_available


# never quantized: a one-row head, query and key projections whose products are thresholded, and the output embedding
UNQUANTIZED = ("lm_head", "zoom.gate.head", "zoom.region.scorer")
# fresh branches are to be trained, so none of their weights is quantized
UNQUANTIZED_FRESH = ("lm_head", "zoom")
# bitsandbytes' name for the list of skipped modules, and that of the other methods
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def _with_vlm_prefix(names: list[str]) -> list[str]:
    """Names that a caller knows from the plain VLM hold below `vlm.` as well."""
    prefixed = [f"vlm.{name}" for name in names if not name.startswith(("vlm.", "zoom."))]
    return [*names, *prefixed]


def protect_from_quantization(quantization_config, names: tuple[str, ...]):
    """A copy of a quantization configuration whose skip list holds `names` besides the caller's own.

    Args:
        quantization_config: a configuration object of transformers, its dict form, or None. The caller's own names may
            be those of the plain VLM (`model.visual`) or of the Q-Zoom model (`vlm.model.visual`).
    """
    if quantization_config is None:
        return None
    protected = copy.deepcopy(quantization_config)
    if isinstance(protected, dict):
        method = protected.get("quant_method", "bitsandbytes")
        is_bitsandbytes = str(getattr(method, "value", method)).startswith("bitsandbytes")
        key = _SKIP_LISTS[0] if is_bitsandbytes else _SKIP_LISTS[1]
        own = protected.get(key) or []
        protected[key] = list(dict.fromkeys([*_with_vlm_prefix(own), *names]))
        return protected
    for key in _SKIP_LISTS:
        if hasattr(protected, key):
            own = getattr(protected, key) or []
            setattr(protected, key, list(dict.fromkeys([*_with_vlm_prefix(own), *names])))
    return protected


def lift_recipe(config) -> None:
    """Moves a pre-quantized VLM's recipe to the top of a `QZoomConfig`, where loading looks for it, with our names.

    The output embedding joins the skip list later, in `keep_output_embedding_dense`: it may be quantized in the files.
    """
    recipe = getattr(config.vlm_config, "quantization_config", None)
    if recipe is None:
        return
    own = recipe.get(_SKIP_LISTS[0]) if isinstance(recipe, dict) else getattr(recipe, _SKIP_LISTS[0], None)
    # without a list of its own, transformers has left the output embedding out
    names = ("zoom",) if own else UNQUANTIZED_FRESH
    config.quantization_config = protect_from_quantization(recipe, names)
    del config.vlm_config.quantization_config


def is_quantized(parameter: Tensor) -> bool:
    return not (parameter.is_floating_point() or parameter.is_complex())


def aligned(module: nn.Module):
    """A context in which a module's own offloaded weights are present."""
    if not is_accelerate_available():
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _dequantize(module: nn.Module, parameter: nn.Parameter) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    dense = dequantize_bnb_weight(parameter, getattr(module, "state", None))
    if is_quantized(dense):
        raise ValueError(
            f"the weights of {type(module).__name__} are quantized by a method that Q-Zoom cannot undo; load the VLM in 16 "
            "bit or with bitsandbytes."
        )
    return dense.clone()


def dense_state(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's weights by name, dequantized where they are quantized and fetched where they are offloaded.

    Args:
        dtype: of the weights that were quantized; what they dequantize to by default.
    """
    state: dict[str, Tensor] = {}
    for name, child in module.named_modules():
        with aligned(child):
            for key, parameter in child.named_parameters(recurse=False):
                full_name = f"{name}.{key}" if name else key
                if is_quantized(parameter):
                    dense = _dequantize(child, parameter)
                    state[full_name] = dense if dtype is None else dense.to(dtype)
                else:
                    state[full_name] = parameter.detach().clone()
    return state


def keep_output_embedding_dense(model) -> None:
    """Dequantizes an output embedding that came quantized with its VLM, and puts it on the recipe's skip list."""
    recipe = getattr(model.config, "quantization_config", None)
    if recipe is None:
        return
    head = model.get_output_embeddings()
    if head is not None and is_quantized(head.weight):
        dense = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        dense.load_state_dict(dense_state(head, model.dtype), assign=True)
        model.set_output_embeddings(dense.requires_grad_(False))
    model.config.quantization_config = protect_from_quantization(recipe, UNQUANTIZED_FRESH)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.quantization_config = model.config.quantization_config


def adopt_loading(model, vlm: nn.Module, zoom_device: torch.device) -> None:
    """Takes over what `from_pretrained` has recorded on a VLM: its quantizer and its device map.

    Args:
        model: the Q-Zoom model around `vlm`.
        zoom_device: where its branches are.
    """
    placement = getattr(vlm, "hf_device_map", None)
    if placement is not None:
        model.hf_device_map = {f"vlm.{name}" if name else "vlm": device for name, device in placement.items()}
        model.hf_device_map["zoom"] = str(zoom_device)
    quantizer = getattr(vlm, "hf_quantizer", None)
    if quantizer is None:
        return
    lift_recipe(model.config)
    model.hf_quantizer = copy.copy(quantizer)
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(vlm, name):
            setattr(model, name, getattr(vlm, name))
    keep_output_embedding_dense(model)


def vlm_recipe(quantization_config: Any) -> Any:
    """A pre-quantized base's recipe in the form that an add-on on it needs: its branches are stored in 16 bit."""
    return protect_from_quantization(quantization_config, ("zoom",))
