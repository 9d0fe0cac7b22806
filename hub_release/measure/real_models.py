"""Models of real size with random weights: loaded as any checkpoint is, and measured on a CUDA device."""

import gc
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from hub_release.measure.shapes import build, protected, skeleton
from hub_release.measure.sizes import ModelClass


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


def question(config: PreTrainedConfig, tokens: int, text_tokens: int = 64) -> tuple[dict[str, Any], dict[str, Any]]:
    """A random prompt on the CUDA device, one image between text, and the options of `generate`.

    Args:
        tokens: visual tokens of the image, to the nearest square; with Q-Zoom also of the crop, which always happens.
        text_tokens: tokens before the image, and after it.

    Returns:
        Inputs and options.
    """
    vlm = getattr(config, "vlm_config", config)
    vision, device = vlm.vision_config, "cuda"
    generator = torch.Generator().manual_seed(0)
    side = max(1, round(tokens**0.5))
    image = torch.full((side * side,), vlm.image_token_id)
    # the special tokens are among the last ones
    text = torch.randint(0, vlm.get_text_config().vocab_size // 2, (2, text_tokens), generator=generator)
    start, end = (torch.tensor([token]) for token in (vlm.vision_start_token_id, vlm.vision_end_token_id))
    ids = torch.cat([text[0], start, image, end, text[1]])[None]
    patches = side * vision.spatial_merge_size
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches * patches, width, generator=generator)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == vlm.image_token_id).int(),
        "pixel_values": pixels.to(torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, patches, patches]]),
    }
    inputs = {name: value.to(device) for name, value in inputs.items()}
    if vlm is config:
        return inputs, {"do_sample": False}
    pixels_a_side = 3 * patches * vision.patch_size  # three times as fine as the coarse view
    source = torch.randint(0, 256, (3, pixels_a_side, pixels_a_side), generator=generator, dtype=torch.uint8)
    budget = {"crop_min_tokens": tokens // 2, "crop_max_tokens": tokens}
    region = {"zoom": "always", "region_threshold": 0.5, "region_threshold_mode": "peak"}
    inputs["source_images"] = [source]
    return inputs, {**budget, **region, "do_sample": False, "return_zoom_reports": True}


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
