"""Models of real size with random weights: loaded as any checkpoint is, and measured on a CUDA device."""

import gc
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from hub_release.measure.shapes import build, protected, skeleton
from hub_release.measure.sizes import ModelClass
from modeling_qzoom.cost_prediction_qzoom import square_grid
from modeling_qzoom.measuring.questions import crop_options, question_inputs


def loaded_bytes(model: nn.Module) -> int:
    """Bytes that a loaded model really takes: parameters, buffers and quantization states, shared ones once."""
    sizes: dict[int, int] = {}

    def add(tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()

    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            add(tensor)
        weight = getattr(module, "weight", None)
        add(getattr(weight, "SCB", None))
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = getattr(state, "state2", None)
            for tensor in (state.absmax, state.code, state.offset):
                add(tensor)
            if nested is not None:
                add(nested.absmax)
                add(nested.code)
    return sum(sizes.values())


def load_random(
    model_class: ModelClass, config: PreTrainedConfig, recipe: BitsAndBytesConfig | None, device: str
) -> PreTrainedModel:
    """The model with random weights in bf16, loaded and quantized by `from_pretrained` as any checkpoint is."""
    torch.manual_seed(0)
    with torch.device(device):
        state = build(model_class, config).to(torch.bfloat16).state_dict()
    loader = model_class
    if model_class is AutoModelForImageTextToText:  # auto classes load by name only
        loader = type(skeleton(model_class, config, None))
        recipe = protected(recipe, model_class)
    arguments = {} if recipe is None else {"quantization_config": recipe}
    model = loader.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, device_map={"": device}, **arguments
    )
    return model.eval()


def question(config: PreTrainedConfig, tokens: int, text_tokens: int = 128) -> tuple[dict[str, Any], dict[str, Any]]:
    """A random question about a random image on the CUDA device, and the options of `generate`.

    Args:
        tokens: visual tokens of the image, to the nearest square; with Q-Zoom also of the crop, which always happens.
        text_tokens: tokens of the prompt beside the visual ones.

    Returns:
        Inputs and options.
    """
    vlm, grid = getattr(config, "vlm_config", config), square_grid(tokens)
    inputs = question_inputs(vlm, grid, grid, text_tokens=text_tokens, dtype=torch.bfloat16)
    inputs = {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    if vlm is config:
        del inputs["source_images"]
        return inputs, {"do_sample": False}
    return inputs, {"zoom": "always", **crop_options(vlm, grid), "do_sample": False, "return_zoom_reports": True}


def measure(
    model_class: ModelClass, config: PreTrainedConfig, recipe: BitsAndBytesConfig | None, tokens: int
) -> dict[str, int]:
    """Bytes on the CUDA device: weights, and the peak while one question is answered with 32 new tokens.

    Args:
        tokens: visual tokens of the image, and of the crop.
    """
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_random(model_class, config, recipe, "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated() - before
    inputs, options = question(config, tokens)
    torch.cuda.reset_peak_memory_stats()
    output = model.generate(**inputs, **options, max_new_tokens=32, min_new_tokens=32, return_dict_in_generate=True)
    peak = torch.cuda.max_memory_allocated() - before
    reports = getattr(output, "zoom_reports", None)
    return {"weights": weights, "peak": peak, "crop_tokens": reports[0].crop_tokens if reports else 0}
