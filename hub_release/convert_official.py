"""Converts a checkpoint of the authors' code into a Q-Zoom checkpoint: `convert_official.py SOURCE OUTPUT`.

Reads Q-Zoom (Qwen2.5-VL, Qwen3-VL) and SD-RPN (Qwen2.5-VL, LLaVA-1.5) folders: safetensors, sharded or not, flat or
nested key names, with or without `lm_head`, with or without a tokenizer. Branch depth, position alignment, budgets and
image statistics come from the folder's own files.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration  # noqa: E402
from modeling_qzoom.backbones_qzoom import BACKBONES, spec_for_config, token_geometry  # noqa: E402


# published thresholds: the authors tune them per benchmark group; documents need less zoom than high-resolution scenes
_PRESETS = {
    "qwen2_5_vl": {
        "fast": {"region_threshold": 0.15, "gate_threshold": 0.10, "crop_min_tokens": 256, "crop_max_tokens": 576},
        "balanced": {
            "region_threshold": 0.125,
            "gate_threshold": 0.05,
            "crop_min_tokens": 256,
            "crop_max_tokens": 576,
        },
        "accurate": {
            "region_threshold": 0.04,
            "gate_threshold": 0.02,
            "crop_min_tokens": 512,
            "crop_max_tokens": 4096,
        },
    },
    "qwen3_vl": {
        "fast": {"region_threshold": 0.15, "gate_threshold": 0.10, "crop_min_tokens": 256, "crop_max_tokens": 576},
        "balanced": {"region_threshold": 0.15, "gate_threshold": 0.05, "crop_min_tokens": 256, "crop_max_tokens": 576},
        "accurate": {
            "region_threshold": 0.10,
            "gate_threshold": 0.025,
            "crop_min_tokens": 512,
            "crop_max_tokens": 4096,
        },
    },
    "llava": {
        "fast": {"region_threshold": 0.15},
        "balanced": {"region_threshold": 0.10},
        "accurate": {"region_threshold": 0.05},
    },
}

_BRANCH_KEY = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(twig_layers|high_res_layers)\.(\d+)\.(.+)$")
_HEAD_KEY = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?high_res_head\.(weight|bias)$")
_NORM_KEY = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?twig_norm\.weight$")
_UNUSED_KEY = re.compile(r"^(?:model\.)?twig_head\.weight$")
_SCORER_PARTS = re.compile(r"^(?:self_attn\.)?((?:input_layernorm|q_proj|k_proj|q_norm|k_norm)\.(?:weight|bias))$")


class ConversionError(ValueError):
    """The folder is not what it should be; the message says what is missing and what to do."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder, {} if it is not there."""
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else {}


def weight_files(source: Path) -> list[Path]:
    """The folder's safetensors files.

    Raises:
        ConversionError: there are none, or the index names a shard that is missing.
    """
    index = read_json(source, "model.safetensors.index.json")
    if index:
        files = [source / name for name in sorted(set(index["weight_map"].values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ConversionError(f"{source}: the index names shards that are missing: {missing[:3]}.")
        return files
    files = sorted(source.glob("model*.safetensors")) or sorted(source.glob("*.safetensors"))
    if not files:
        hint = " It holds .bin files; convert them to safetensors first." if list(source.glob("*.bin")) else ""
        raise ConversionError(f"{source} holds no safetensors files.{hint}")
    return files


def _setting(config: dict[str, Any], name: str) -> Any:
    """A key of the authors' config, which Qwen3-VL repeats inside text_config; the top level wins."""
    return config.get(name, config.get("text_config", {}).get(name))


def branch_key(key: str, depth: int) -> str | None:
    """Our name of a branch weight of theirs; "" for weights that nothing uses, None for the VLM's own weights."""
    if _UNUSED_KEY.match(key):
        return ""
    if match := _HEAD_KEY.match(key):
        return f"zoom.gate.head.{match[1]}"
    if _NORM_KEY.match(key):
        return "zoom.region.norm.weight"
    match = _BRANCH_KEY.match(key)
    if match is None:
        return None
    branch, layer, rest = match[1], int(match[2]), match[3]
    if branch == "high_res_layers":
        return f"zoom.gate.layers.{layer}.{rest}"
    if layer < depth - 1:
        return f"zoom.region.layers.{layer}.{rest}"
    # of the last layer only norm, queries and keys score; the authors store the rest unused
    part = _SCORER_PARTS.match(rest)
    return f"zoom.region.scorer.{part[1]}" if part else ""


def backbone_config(source: Path, config: dict[str, Any]):
    """The VLM's configuration without the authors' own keys."""
    model_type = config.get("model_type")
    aliases = {"llava_llama": "llava", "qwen2_5_vl_text": "qwen2_5_vl"}
    model_type = aliases.get(model_type, model_type)
    if model_type not in BACKBONES:
        raise ConversionError(f"{source}: model_type {model_type!r} is not one of {sorted(BACKBONES)}.")
    own = re.compile(r"^(twig_|roi_|high_res_|enable_twig|enable_high_res|reuse_src_pos|add_noise_to_roi|mm_config)")

    def clean(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: clean(value) for key, value in part.items() if not own.match(key)}
        return part

    cleaned = {
        key: value for key, value in clean(config).items() if key not in ("model_type", "min_pixels", "max_pixels")
    }
    cleaned.pop("architectures", None)
    if model_type == "llava" and "text_config" not in cleaned:
        return _llava_config(cleaned)
    return AutoConfig.for_model(model_type, **cleaned)


def _llava_config(flat: dict[str, Any]):
    """LLaVA-1.5's original flat configuration (a LLaMA with `mm_*` keys) in transformers' form."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    } | flat.get("vision_config", {})
    text = {key: value for key, value in flat.items() if not key.startswith(("mm_", "image_", "vision_"))}
    return AutoConfig.for_model(
        "llava",
        text_config={**text, "model_type": "llama"},
        vision_config=vision,
        image_token_id=flat.get("image_token_index", flat.get("image_token_id", 32000)),
        vision_feature_layer=flat.get("mm_vision_select_layer", -2),
    )


def qzoom_config(source: Path, keys: set[str]) -> QZoomConfig:
    """Reads K, T, alignment, budgets and statistics from the folder.

    Args:
        keys: names of all its weights.
    """
    config, preprocessor = read_json(source, "config.json"), read_json(source, "preprocessor_config.json")
    if not config:
        raise ConversionError(f"{source} holds no config.json.")
    layer, depth = _setting(config, "twig_K"), _setting(config, "twig_T")
    if layer is None or depth is None:
        raise ConversionError(
            f"{source}/config.json has no twig_K and twig_T: this is not a Q-Zoom or SD-RPN checkpoint."
        )
    vlm_config = backbone_config(source, config)
    spec, geometry = spec_for_config(vlm_config), token_geometry(vlm_config)
    has_gate = any("high_res_head" in key for key in keys)
    gate_layer, gate_depth = _setting(config, "high_res_K"), _setting(config, "high_res_T")
    if has_gate and (gate_layer not in (None, layer) or gate_depth not in (None, depth)):
        raise ConversionError(
            f"{source}: the gate reads at K={gate_layer}, T={gate_depth}, the region branch at K={layer}, T={depth}; one "
            "model with two different branches is not supported."
        )
    fields: dict[str, Any] = {"presets": _PRESETS[vlm_config.model_type], "effort": None}
    fields |= {key: value for key, value in fields["presets"]["balanced"].items() if key.endswith("threshold")}
    if spec.mrope:
        reuse = bool(_setting(config, "reuse_src_pos"))
        fields["position_alignment"] = "continuous" if reuse else "sequential"
        pixels = {key: config.get(key) or preprocessor.get(key) for key in ("min_pixels", "max_pixels")}
        size = preprocessor.get("size") or {}
        low, high = pixels["min_pixels"] or size.get("shortest_edge"), pixels["max_pixels"] or size.get("longest_edge")
        area = geometry.token_side**2
        fields["min_tokens"] = max(1, -(-low // area)) if low else 256
        fields["max_tokens"] = max(1, high // area) if high else 576
    for name in ("image_mean", "image_std"):
        if preprocessor.get(name):
            fields[name] = preprocessor[name]
    return QZoomConfig(vlm_config=vlm_config, branch_layer=layer, branch_depth=depth, has_gate=has_gate, **fields)


def convert_weights(
    files: list[Path], depth: int, tied: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Splits a checkpoint into the VLM's weights (their names) and branch weights (ours)."""
    vlm, branches = {}, {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():
                name = branch_key(key, depth)
                if name is None:
                    if not (tied and key.endswith("lm_head.weight")):
                        vlm[key] = weights.get_tensor(key)
                elif name:
                    branches[name] = weights.get_tensor(key)
    return vlm, branches


def convert(source: Path, output: Path) -> QZoomForConditionalGeneration:
    """Writes a full Q-Zoom checkpoint and returns the loaded model.

    Raises:
        ConversionError: bad source, or an output folder that is not empty.
    """
    if not source.is_dir():
        raise ConversionError(f"{source} is not a folder.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not an empty folder; choose another one.")
    files = weight_files(source)
    keys: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            keys |= set(weights.keys())
    config = qzoom_config(source, keys)
    vlm, branches = convert_weights(files, config.branch_depth, bool(config.tie_word_embeddings))
    if not spec_for_config(config.vlm_config).region_norm:
        branches.pop("zoom.region.norm.weight", None)  # SD-RPN's Qwen files carry one that nothing uses
    dtype = next(iter(branches.values())).dtype if branches else torch.bfloat16
    config.dtype = dtype
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as work:
        # the VLM's names are left to transformers' own conversion, one loading pass reads both files
        save_file(vlm, Path(work) / "model-00001-of-00002.safetensors", {"format": "pt"})
        save_file(branches, Path(work) / "model-00002-of-00002.safetensors", {"format": "pt"})
        weight_map = dict.fromkeys(vlm, "model-00001-of-00002.safetensors")
        weight_map |= dict.fromkeys(branches, "model-00002-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (Path(work) / "model.safetensors.index.json").write_text(json.dumps(index))
        config.save_pretrained(work)
        try:
            model = QZoomForConditionalGeneration.from_pretrained(work, dtype=dtype)
        except ValueError as error:
            raise ConversionError(f"{source}: {str(error).replace(work, str(source))}") from error
    if (source / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(output)
    for pattern in ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        for file in source.glob(pattern):
            shutil.copy(file, output / file.name)
    return model


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder in the authors' format")
    parser.add_argument("output", type=Path, help="folder to write; absent or empty")
    arguments = parser.parse_args()
    try:
        model = convert(arguments.source, arguments.output)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    config = model.config
    print(
        f"wrote {arguments.output}: {config.vlm_config.model_type}, K={config.branch_layer}, T={config.branch_depth}, "
        f"gate={'yes' if config.has_gate else 'no'}, positions={config.position_alignment}, "
        f"budget={config.min_tokens}-{config.max_tokens} tokens"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
