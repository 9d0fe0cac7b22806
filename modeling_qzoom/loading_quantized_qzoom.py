"""Quantized models: what stays in 16 bit, recipes of pre-quantized VLMs, and dense copies of quantized weights.

`quantization_config=` of `from_pretrained` takes any recipe of transformers; nf4 (with or without double quantization)
and int8 of bitsandbytes are tested, on the CPU too. Embeddings, norms, biases and convolutions are never quantized.
Whatever a recipe's skip list says, these layers stay in 16 bit as well:

- `lm_head`: transformers spares it only as long as a recipe has no skip list of its own.
- `zoom.gate.head`: a single row, so nothing is saved, and its logit is held against a threshold.
- `zoom.region.scorer`: the products of its queries and keys are the heat map, which is held against a threshold;
  rounding them moves boxes.
- `visor`: the router of VISOR, whose logits are compared with each other.

Put the vision tower on the skip list too (`llm_int8_skip_modules=["model.visual"]`, LLaVA: `"model.vision_tower"` and
`"model.multi_modal_projector"`; names of the plain VLM): small print reaches the decoder through it alone. 4-bit
kernels on the CPU also need widths that are multiples of 64, which Qwen2.5-VL's vision MLP (3420) has not.
Names match from the start or as an ending: "visual" would match nothing below it.

`from_backbone` quantizes the VLM alone: fresh branches are to be trained. A quantized model is saved with
`save_pretrained` and loads again without a recipe.
"""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_accelerate_available

from .errors_qzoom import UnsupportedError
from .loading_names_qzoom import OWN_WEIGHTS


# never quantized: a one-row head, query and key projections whose products are thresholded, and the output embedding
UNQUANTIZED = ("lm_head", "zoom.gate.head", "zoom.region.scorer", "visor")
# fresh branches are to be trained, so none of their weights is quantized
UNQUANTIZED_FRESH = ("lm_head", "zoom", "visor")
# bitsandbytes' name for the list of skipped modules, and that of the other methods
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def _with_vlm_prefix(names: list[str]) -> list[str]:
    """Names that a caller knows from the plain VLM hold below `vlm.` as well."""
    prefixed = [f"vlm.{name}" for name in names if not name.startswith(("vlm.", *OWN_WEIGHTS))]
    return [*names, *prefixed]


def protect_from_quantization(quantization_config: Any, names: tuple[str, ...]) -> Any:
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
        names_of_caller = protected.get(key) or []
        protected[key] = list(dict.fromkeys([*_with_vlm_prefix(names_of_caller), *names]))
        return protected
    for key in _SKIP_LISTS:
        if hasattr(protected, key):
            names_of_caller = getattr(protected, key) or []
            setattr(protected, key, list(dict.fromkeys([*_with_vlm_prefix(names_of_caller), *names])))
    return protected


def is_quantized(parameter: Tensor) -> bool:
    """Whether a weight is stored in packed whole numbers."""
    return not (parameter.is_floating_point() or parameter.is_complex())


def aligned(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which a module's own offloaded weights are present."""
    if not is_accelerate_available():
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def restore_storage_format(module: nn.Module) -> None:
    """Undoes the packing of 4-bit weights that bitsandbytes does at their first use on some CPUs.

    bitsandbytes' own way back (as of 0.50) leaves the block scales transposed, so that a model saved or dequantized
    after it has been used would differ. The next use packs them again.
    """
    for child in module.modules():
        weight: Any = getattr(child, "weight", None)
        if not getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            continue
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        # its double quantization would round the block scales anew; they are saved as they are used
        weight.quant_state.original_nested = False
        weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        if state.absmax.ndim == 2:  # (blocks in a row, rows)
            state.absmax = state.absmax.T.reshape(-1).float()
        weight.quant_state = state


def forget_unpacking(model: PreTrainedModel) -> None:
    """Lets a model whose 4-bit weights were read from a checkpoint be saved again.

    On saving, transformers undoes the steps by which it has read a checkpoint. The step that reads packed weights has
    no way back (as of 5.24) and needs none: they are written as they are packed.
    """
    steps = getattr(model, "_weight_conversions", None)
    if steps:
        model._weight_conversions = [step for step in steps if not _reads_packed(step)]


def _reads_packed(step: Any) -> bool:
    operations = getattr(step, "operations", None) or ()
    return any(type(operation).__module__.endswith("integrations.bitsandbytes") for operation in operations)


def _dequantize(module: nn.Module, parameter: nn.Parameter) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    restore_storage_format(module)
    dense = dequantize_bnb_weight(parameter, getattr(module, "state", None))
    if is_quantized(dense):
        raise UnsupportedError(
            f"the weights of {type(module).__name__} are quantized by a method that Q-Zoom cannot undo; load the VLM "
            "in 16 bit or with bitsandbytes."
        )
    return dense.clone()


def dense_state(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's weights by name, dequantized where they are quantized and fetched where they are offloaded.

    Args:
        module: module whose weights are read.
        dtype: type of the weights that were quantized; by default what they dequantize to.
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


def keep_output_embedding_dense(model: PreTrainedModel) -> None:
    """Dequantizes an output embedding that its checkpoint holds quantized, and puts it on the skip list."""
    head = model.get_output_embeddings()
    if head is None or not is_quantized(head.weight):
        return
    dense = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    dense.load_state_dict(dense_state(head, model.dtype), assign=True)
    model.set_output_embeddings(dense.requires_grad_(False))
    recipe = getattr(model.config, "quantization_config", None)
    _set_recipe(model, protect_from_quantization(recipe, UNQUANTIZED))


def _set_recipe(model: PreTrainedModel, recipe: Any) -> None:
    model.config.quantization_config = recipe
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.quantization_config = recipe


def adopt_quantizer(model: PreTrainedModel, vlm: PreTrainedModel) -> None:
    """Makes a Q-Zoom model around a quantized VLM one that saves and loads as a quantized model.

    The VLM's recipe moves to the top of the config, where loading looks for it, with names of the whole model.
    """
    quantizer = getattr(vlm, "hf_quantizer", None)
    if quantizer is None:
        return
    model.hf_quantizer = copy.copy(quantizer)
    _set_recipe(model, protect_from_quantization(quantizer.quantization_config, UNQUANTIZED_FRESH))
    del model.config.vlm_config.quantization_config
    keep_output_embedding_dense(model)
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(vlm, name):
            setattr(model, name, getattr(vlm, name))


def execution_device(layer: nn.Module) -> torch.device:
    """Where a layer computes, also if its weights are offloaded."""
    for module in layer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(layer.parameters()).device


def adopt_placement(model: PreTrainedModel, vlm: PreTrainedModel, device: torch.device) -> None:
    """Takes a VLM's device map over, and makes the branches fetch their inputs.

    Args:
        model: the Q-Zoom model around `vlm`.
        device: where its branches are.
    """
    placement = getattr(vlm, "hf_device_map", None)
    if placement is None:
        return
    model.hf_device_map = {f"vlm.{name}" if name else "vlm": target for name, target in placement.items()}
    model.hf_device_map["zoom"] = device.index if device.index is not None else device.type
    if len(set(placement.values())) == 1 and "disk" not in placement.values():
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for branch in model.zoom.children():
        add_hook_to_module(branch, AlignDevicesHook(execution_device=device))


def vlm_recipe(quantization_config: Any) -> Any:
    """A pre-quantized base's recipe in the form that an add-on on it needs: its branches are stored in 16 bit."""
    return protect_from_quantization(quantization_config, ("zoom", "visor"))
