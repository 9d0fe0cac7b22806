"""What a model's memory holds, computed from its shapes: `python hub_release/measure/memory.py`.

Weights of Qwen2.5-VL-3B and -7B and Qwen3-VL-4B, plain and with Q-Zoom, in bf16, int8 and nf4, and their KV cache.
Nothing is downloaded and no weight is made: the models stand on the meta device, and the quantizer of transformers
itself decides there which layers it takes. `--measure` builds the same models with random weights on a CUDA device and
sets what they really take beside it, together with the peak of answering one question. Sizes are in GiB (2^30 bytes).
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_bitsandbytes_available, logging


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hub_release.measure.sizes import MODELS, ModelRow, question  # noqa: E402
from modeling_qzoom import QZoomForConditionalGeneration  # noqa: E402
from modeling_qzoom.loading_quantized_qzoom import UNQUANTIZED, protect_from_quantization  # noqa: E402


GIB = 2**30
DENSE_BYTES = 2  # what is not quantized is in 16 bit
BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one (double quantization)
VISION = ["model.visual"]
"""The vision tower, which the recipes of the README keep in 16 bit."""
VARIANTS = {
    "plain": (False, VISION),
    "with Q-Zoom": (True, VISION),
    "with Q-Zoom, vision tower quantized too": (True, ["lm_head"]),
}
"""Per row of the table: whether it has branches, and the skip list."""


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


def protected(recipe: BitsAndBytesConfig | None, model_class: type) -> BitsAndBytesConfig | None:
    """A recipe as loading uses it: the output embedding stays in 16 bit, and with Q-Zoom what its branches need."""
    names = UNQUANTIZED if model_class is QZoomForConditionalGeneration else ("lm_head",)
    return protect_from_quantization(recipe, names)


def skeleton(model_class: type, config: PreTrainedConfig, recipe: BitsAndBytesConfig | None) -> nn.Module:
    """The model without weights, its layers exchanged as the quantizer would exchange them while loading."""
    build = model_class if model_class is QZoomForConditionalGeneration else model_class.from_config
    with torch.device("meta"):
        model = build(config)
    model.tie_weights()
    recipe = protected(recipe, model_class)
    if recipe is not None:
        AutoHfQuantizer.from_config(recipe, pre_quantized=False).preprocess_model(model=model, device_map={"": "cpu"})
    return model


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights.

    Args:
        dense: what stays in 16 bit, and the rotary tables.
        packed: quantized values.
        scales: what is needed to undo the quantization: block scales, their own scales, code books.
    """

    dense: int
    packed: int
    scales: int

    @property
    def total(self) -> int:
        return self.dense + self.packed + self.scales


def _scale_bytes(module: nn.Module) -> int:
    """Bytes beside a quantized layer's values."""
    if hasattr(module.weight, "SCB"):  # int8: a float32 for every output
        return 4 * module.out_features
    blocks = -(-module.weight.numel() // BLOCK)
    code_books = 4 * 16
    if not module.weight.compress_statistics:
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


def held_bytes(model: nn.Module) -> int:
    """Bytes that a loaded model really holds: parameters, buffers and quantization states, shared ones once."""
    found: dict[int, int] = {}

    def add(tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()

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
    return sum(found.values())


def load_random(
    model_class: type, config: PreTrainedConfig, recipe: BitsAndBytesConfig | None, device: str
) -> nn.Module:
    """The model with random weights in bf16, loaded and quantized by `from_pretrained` as any checkpoint is."""
    torch.manual_seed(0)
    build = model_class if model_class is QZoomForConditionalGeneration else model_class.from_config
    with torch.device(device):
        state = build(config).to(torch.bfloat16).state_dict()
    loader = model_class
    if model_class is AutoModelForImageTextToText:  # auto classes load by name only
        loader = type(skeleton(model_class, config, None))
        recipe = protected(recipe, model_class)
    arguments = {} if recipe is None else {"quantization_config": recipe}
    model = loader.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, device_map={"": device}, **arguments
    )
    return model.eval()


def measure(model_class: type, config: PreTrainedConfig, recipe: BitsAndBytesConfig | None, tokens: int) -> dict:
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


def rows(models: list[ModelRow], variants: list[str], measured_tokens: int | None) -> Iterator[dict[str, Any]]:
    """One row per model and variant: bytes by recipe.

    Args:
        measured_tokens: measure too, with so many visual tokens; None only computes.
    """
    for model in models:
        for variant in variants:
            zooms, skip = VARIANTS[variant]
            config, model_class = model.config(zooms)
            row: dict[str, Any] = {"model": model.name, "variant": variant, "bytes": {}}
            row["cache_per_token"] = cache_bytes(config, 1)
            for name, recipe in recipes(skip).items():
                counted = weight_bytes(skeleton(model_class, config, recipe))
                row["bytes"][name] = {"computed": counted.total, **vars(counted)}
                if measured_tokens is not None:
                    row["bytes"][name] |= measure(model_class, config, recipe, measured_tokens)
            yield row


def header() -> str:
    names = list(recipes([]))
    return f"| | {' | '.join(names)} | KV cache, 1,000 tokens |\n{'|---' * (len(names) + 2)}|"


def markdown(row: dict[str, Any]) -> str:
    """A row of the table: computed GiB, and where it was measured also measured GiB and peak."""
    cells = []
    for entry in row["bytes"].values():
        cells.append(f"{entry['computed'] / GIB:.2f}")
        if "peak" in entry:
            cells[-1] += f" ({entry['weights'] / GIB:.2f}, peak {entry['peak'] / GIB:.2f})"
    cache = f"{1000 * row['cache_per_token'] / GIB:.3f}"
    return f"| {row['model']}, {row['variant']} | {' | '.join(cells)} | {cache} |"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--measure", action="store_true", help="also build them on the CUDA device, and measure")
    parser.add_argument("--tokens", type=int, default=576, help="visual tokens of image and crop when measuring")
    parser.add_argument("--json", type=Path, help="also write the numbers here, in bytes")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    problem = None
    if not is_bitsandbytes_available():
        problem = "layers are counted as bitsandbytes makes them: pip install 'qzoom[quantize]'"
    elif options.measure and not torch.cuda.is_available():
        problem = "--measure needs a CUDA device; without it the table is computed anywhere"
    elif options.tokens < 4:
        problem = f"--tokens must be at least 4, got {options.tokens}"
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    models = [MODELS[name] for name in options.models]
    table = []
    print(header())
    for row in rows(models, options.variants, options.tokens if options.measure else None):
        print(markdown(row), flush=True)
        table.append(row)
    if options.measure:
        print(f"\nIn brackets: measured on {torch.cuda.get_device_name()}, torch {torch.__version__}.")
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
