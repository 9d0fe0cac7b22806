"""The checkpoint formats of the authors' code (Q-Zoom and SD-RPN): names of weights, and configurations."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from hub_release.official.presets import PRESETS
from modeling_qzoom import QZoomConfig
from modeling_qzoom.backbones_qzoom import BACKBONES, spec_for_config, token_grid_of


# tokens of the coarse view in the authors' document benchmarks
_FALLBACK_BUDGET = (256, 576)

_PREFIX = r"^(?:model\.)?(?:language_model\.)?(?:model\.)?"
_BRANCH = re.compile(_PREFIX + r"((?:twig|high_res)_(?:layers|head|norm)\..+)$")
_VLM_NAMES = [
    (re.compile(r"^(?:model\.)?visual\."), "model.visual."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(?:model\.)?mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^(?:model\.)?mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^(?:language_model\.)?lm_head\."), "lm_head."),
    (re.compile(_PREFIX + r"(layers|embed_tokens|norm)\."), r"model.language_model.\1."),
]
_OWN_KEYS = re.compile(r"^(twig_|roi_|high_res_|enable_twig|enable_high_res|reuse_src_pos|add_noise_to_roi|mm_config)")
_MODEL_TYPES = {"llava_llama": "llava"}
# what the published LLaVA-1.5 configurations leave to their defaults
LLAVA_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_LLAVA_IMAGE_TOKEN = 32000


class ConversionError(ValueError):
    """The folder is not what it should be; the message says what is missing and what to do."""


def read_json(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of the folder, {} if there is no such file or folder.

    Raises:
        ConversionError: it is damaged.
    """
    path = None if folder is None else folder / name
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object.")
    return content


def image_settings(folder: Path | None) -> dict[str, Any]:
    """Settings of the folder's image processor, in either of the files that may hold them."""
    return read_json(folder, "preprocessor_config.json") or read_json(folder, "processor_config.json").get(
        "image_processor", {}
    )


def branch_name(key: str) -> str | None:
    """The authors' name of a branch weight without the prefix, such as `twig_layers.0.mlp.up_proj.weight`; None for
    weights of the VLM."""
    match = _BRANCH.match(key)
    return match[1] if match else None


def vlm_name(key: str) -> str:
    """Transformers' name of a VLM weight; unknown names stay as they are."""
    for pattern, replacement in _VLM_NAMES:
        if pattern.match(key):
            return pattern.sub(replacement, key)
    return key


def official_name(name: str, depth: int) -> str:
    """What the authors call one of our branch weights.

    Args:
        name: our name, such as `zoom.region.layers.0.mlp.up_proj.weight`.
        depth: T; the scorer is what the authors use of twig layer T - 1.
    """
    _, branch, part, *rest = name.split(".")
    tail = ".".join(rest)
    if part == "scorer":
        inner = tail if tail.startswith("input_layernorm") else f"self_attn.{tail}"
        return f"twig_layers.{depth - 1}.{inner}"
    return f"{'high_res' if branch == 'gate' else 'twig'}_{part}.{tail}"


def is_unused(name: str, config: QZoomConfig) -> bool:
    """Whether the authors' code stores this branch weight without using it."""
    if name.startswith("high_res_"):
        return not config.has_gate
    # Qwen's norm, and all of the last twig layer but norm, queries and keys
    return name.startswith(("twig_head.", "twig_norm.", f"twig_layers.{config.branch_depth - 1}."))


def _setting(config: dict[str, Any], name: str) -> Any:
    """A key of the authors' config, which Qwen3-VL repeats inside text_config; the top level wins."""
    return config.get(name, config.get("text_config", {}).get(name))


def vlm_config(source: Path, config: dict[str, Any], base: Path | None) -> PreTrainedConfig:
    """The VLM's own configuration.

    Args:
        source: folder in the authors' format, for messages.
        config: the authors' config.json.
        base: folder of the plain VLM, if known.

    Raises:
        ConversionError: a family that is not supported.
    """
    model_type = config.get("model_type")
    model_type = _MODEL_TYPES.get(model_type, model_type) if isinstance(model_type, str) else None
    if model_type not in BACKBONES:
        raise ConversionError(f"{source}: model_type {model_type!r} is not one of {sorted(BACKBONES)}.")

    def clean(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: clean(value) for key, value in part.items() if not _OWN_KEYS.match(key)}
        return part

    dropped = ("model_type", "architectures", "min_pixels", "max_pixels", "transformers_version")
    fields = {key: value for key, value in clean(config).items() if key not in dropped}
    tied = _setting(config, "tie_word_embeddings")
    if tied is not None:
        fields["tie_word_embeddings"] = tied
    if model_type == "llava" and "text_config" not in fields:
        return _llava_config(config, read_json(base, "config.json"))
    return AutoConfig.for_model(model_type, **fields)


def _llava_config(flat: dict[str, Any], base: dict[str, Any]) -> PreTrainedConfig:
    """LLaVA-1.5's original flat configuration (a LLaMA with `mm_*` keys) in transformers' form."""
    foreign = ("mm_", "image_", "vision_", "tune_", "model_type", "architectures")
    text = {key: value for key, value in flat.items() if not key.startswith(foreign) and not _OWN_KEYS.match(key)}
    return AutoConfig.for_model(
        "llava",
        text_config={**text, "model_type": "llama"},
        # the original config only names the tower, always CLIP-L at 336 pixels
        vision_config={**LLAVA_VISION, **base.get("vision_config", flat.get("vision_config", {}))},
        image_token_id=base.get("image_token_index", base.get("image_token_id", _LLAVA_IMAGE_TOKEN)),
        vision_feature_layer=flat.get("mm_vision_select_layer", -2),
        tie_word_embeddings=flat.get("tie_word_embeddings", False),
    )


def _branch_size(source: Path, config: dict[str, Any]) -> tuple[int, int]:
    """K and T of the branches.

    Raises:
        ConversionError: the configuration names none.
    """
    layer, depth = _setting(config, "twig_K"), _setting(config, "twig_T")
    if not layer or not depth:
        raise ConversionError(
            f"{source}/config.json has no twig_K and twig_T: this is not a Q-Zoom or SD-RPN checkpoint."
        )
    return layer, depth


def _has_gate(source: Path, config: dict[str, Any], branch_names: set[str], size: tuple[int, int]) -> bool:
    """Whether there is a gate; by its weights where the configuration does not say.

    Raises:
        ConversionError: the gate reads other layers than the region branch.
    """
    has_gate = _setting(config, "enable_high_res")
    if has_gate is None:
        has_gate = any(name.startswith("high_res_head.") for name in branch_names)
    gate_size = _setting(config, "high_res_K"), _setting(config, "high_res_T")
    if has_gate and any(given not in (None, own) for given, own in zip(gate_size, size, strict=True)):
        raise ConversionError(
            f"{source}: the gate has K={gate_size[0]}, T={gate_size[1]}, the region branch K={size[0]}, T={size[1]}; "
            "branches that read different layers are not supported."
        )
    return bool(has_gate)


def _coarse_budget(config: dict[str, Any], images: dict[str, Any], token_area: int) -> tuple[int, int]:
    """Fewest and most tokens of the coarse view.

    Args:
        images: settings of the image processor.
        token_area: pixels of a token.
    """
    size = images.get("size") or {}
    low = config.get("min_pixels") or images.get("min_pixels") or size.get("shortest_edge")
    high = config.get("max_pixels") or images.get("max_pixels") or size.get("longest_edge")
    return (
        max(1, -(-low // token_area)) if low else _FALLBACK_BUDGET[0],
        max(1, high // token_area) if high else _FALLBACK_BUDGET[1],
    )


def qzoom_config(source: Path, branch_names: set[str], base: Path | None) -> QZoomConfig:
    """K, T, gate, alignment, budgets, image statistics and presets, read from the folder's files.

    Args:
        source: folder in the authors' format.
        branch_names: what `branch_name` makes of its weights.
        base: folder of the plain VLM, which may hold the image settings that `source` lacks.

    Raises:
        ConversionError: no config.json, one without K and T, or one that describes what is not supported.
    """
    config = read_json(source, "config.json")
    if not config:
        raise ConversionError(f"{source} holds no config.json.")
    size = _branch_size(source, config)
    vlm = vlm_config(source, config, base)
    has_gate = _has_gate(source, config, branch_names, size)
    images = image_settings(source) or image_settings(base)
    # a combination that nobody has published borrows its family's thresholds
    presets = PRESETS.get((vlm.model_type, has_gate)) or PRESETS[vlm.model_type, not has_gate]
    fields: dict[str, Any] = {"presets": presets}
    fields |= {key: value for key, value in presets["balanced"].items() if key.endswith("threshold")}
    if spec_for_config(vlm).mrope:
        fields["position_alignment"] = "continuous" if _setting(config, "reuse_src_pos") else "sequential"
        area = token_grid_of(vlm).token_side ** 2
        fields["min_tokens"], fields["max_tokens"] = _coarse_budget(config, images, area)
    for name in ("image_mean", "image_std"):
        fields[name] = images.get(name)  # QZoomConfig falls back to the family's
    try:
        return QZoomConfig(vlm_config=vlm, branch_layer=size[0], branch_depth=size[1], has_gate=has_gate, **fields)
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from error
