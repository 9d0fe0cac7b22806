"""Bytes of weights and caches, computed from shapes: models stand on the meta device, quantized or not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from hub_release.measure.sizes import ModelClass
from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.loading_quantized_qzoom import UNQUANTIZED, protect_from_quantization


# what is not quantized is in 16 bit
DENSE_BYTES = 2
# weights that share a scale, and scales that share one (double quantization)
BLOCK, NESTED_BLOCK = 64, 256


def recipes(skip: list[str]) -> dict[str, BitsAndBytesConfig | None]:
    """The recipes of the table's columns; what is computed with is bfloat16 in all of them.

    Args:
        skip: modules that stay in 16 bit besides those that always do.
    """
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {
        "bf16": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip),
        "nf4": BitsAndBytesConfig(**nf4, llm_int8_skip_modules=skip),
        "nf4, double": BitsAndBytesConfig(**nf4, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip),
    }


def protected(recipe: BitsAndBytesConfig | None, model_class: ModelClass) -> BitsAndBytesConfig | None:
    """A recipe as loading uses it: the output embedding stays in 16 bit, and with Q-Zoom what its branches need."""
    names = UNQUANTIZED if model_class is QZoomForConditionalGeneration else ("lm_head",)
    return protect_from_quantization(recipe, names)


def build(model_class: ModelClass, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights on the current device."""
    return model_class(config) if model_class is QZoomForConditionalGeneration else model_class.from_config(config)


def skeleton(model_class: ModelClass, config: PreTrainedConfig, recipe: BitsAndBytesConfig | None) -> nn.Module:
    """The model without weights, its layers exchanged as the quantizer would exchange them while loading."""
    with torch.device("meta"):
        model = build(model_class, config)
    model.tie_weights()
    recipe = protected(recipe, model_class)
    if recipe is not None:
        AutoHfQuantizer.from_config(recipe, pre_quantized=False).preprocess_model(model=model, device_map={"": "cpu"})
    return model


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights.

    Attributes:
        dense: what stays in 16 bit, and the rotary tables.
        packed: quantized values.
        scales: what is needed to undo the quantization: block scales, their own scales, code books.
    """

    dense: int
    packed: int
    scales: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.packed + self.scales


def _scale_bytes(layer: Any) -> int:
    """Bytes beside the values of a layer that bitsandbytes has quantized."""
    if hasattr(layer.weight, "SCB"):  # int8: a float32 for every output
        return 4 * layer.out_features
    blocks = -(-layer.weight.numel() // BLOCK)
    code_books = 4 * 16
    if not layer.weight.compress_statistics:
        return 4 * blocks + code_books
    code_books += 4 * 256  # every layer holds its own copy
    return blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 + code_books  # 4: the mean that was taken off the scales


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Bytes that a skeleton's weights take; tied weights count once."""
    import bitsandbytes

    dense = packed = scales = 0
    counted: set[int] = set()
    for module in model.modules():
        quantized = isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            if not quantized or name != "weight":
                dense += DENSE_BYTES * parameter.numel()
                continue
            is_4bit = isinstance(module, bitsandbytes.nn.Linear4bit)
            packed += -(-parameter.numel() // 2) if is_4bit else parameter.numel()
            scales += _scale_bytes(module)
        dense += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers(recurse=False))
    return WeightBytes(dense, packed, scales)


def cache_bytes(config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of the KV cache in 16 bit: two vectors a layer, KV head and token."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * DENSE_BYTES * text.num_hidden_layers * text.num_key_value_heads * head_dim * tokens
