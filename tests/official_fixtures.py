"""Tiny random models as folders in the authors' format."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


DEPTH = 2
# how files of each kind spell transformers' names: (branch prefix, substitutions)
NAMINGS = {
    "flat": ("model.", [("^model.visual", "visual"), ("^model.language_model", "model")]),
    "nested": ("model.language_model.", []),
    "inner": ("language_model.", [("^model.visual", "visual"), ("^model.language_model", "language_model")]),
    "llava_original": (
        "model.",
        [
            (r"^model.vision_tower", "model.vision_tower.vision_tower.vision_model"),
            (r"^model.multi_modal_projector.linear_1", "model.mm_projector.0"),
            (r"^model.multi_modal_projector.linear_2", "model.mm_projector.2"),
            (r"^model.language_model", "model"),
        ],
    ),
    "llava_transformers": (
        "language_model.model.",
        [
            (r"^model.vision_tower", "vision_tower.vision_model"),
            (r"^model.multi_modal_projector", "multi_modal_projector"),
            (r"^model.language_model", "language_model.model"),
            (r"^lm_head", "language_model.lm_head"),
        ],
    ),
}


def official_weights(model, naming: str) -> dict[str, torch.Tensor]:
    """The model's weights under the authors' names, with those that their code stores without using them."""
    prefix, substitutions = NAMINGS[naming]
    weights = {}
    for name, tensor in model.vlm.state_dict().items():
        for pattern, replacement in substitutions:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    for name, tensor in model.zoom.state_dict().items():
        branch, rest = name.split(".", 1)
        if rest.startswith("scorer."):
            inner = rest.removeprefix("scorer.")
            inner = inner if "layernorm" in inner else f"self_attn.{inner}"
            rest = f"layers.{DEPTH - 1}.{inner}"
        weights[f"{prefix}{'high_res' if branch == 'gate' else 'twig'}_{rest}"] = tensor
    weights[f"{prefix}twig_layers.{DEPTH - 1}.mlp.up_proj.weight"] = torch.zeros(128, 64)
    weights[f"{prefix}twig_layers.{DEPTH - 1}.self_attn.o_proj.weight"] = torch.zeros(64, 64)
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def write_folder(
    folder: Path, model, naming: str = "flat", *, drop: str | None = None, extra=None, config=None, **settings
) -> Path:
    """A folder in the authors' format.

    Args:
        drop: pattern of weights to leave out.
        extra: further weights.
        config: replaces the VLM's configuration.
        settings: further keys of config.json; None removes one.
    """
    folder.mkdir(parents=True)
    weights = official_weights(model, naming) | (extra or {})
    weights = {name: tensor for name, tensor in weights.items() if not (drop and re.search(drop, name))}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fields = config if config is not None else model.config.vlm_config.to_dict()
    fields |= {"twig_K": model.config.branch_layer, "twig_T": DEPTH, "enable_twig": True, "roi_loss": "bce"}
    fields |= {"enable_high_res": True} if model.config.has_gate else {}
    fields |= {"reuse_src_pos": True, "min_pixels": 4 * 28**2, "max_pixels": 24 * 28**2, "torch_dtype": "float32"}
    fields = {key: value for key, value in (fields | settings).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def flat_llava_config(model) -> dict:
    """LLaVA-1.5's original configuration."""
    config = model.config.vlm_config
    text = {key: value for key, value in config.text_config.to_dict().items() if key != "model_type"}
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2}
    return {**text, **tower, "model_type": "llava_llama", "image_aspect_ratio": "pad"}


def assert_same_weights(converted, model, *, rows: int | None = None) -> None:
    """Every weight of `model` is in `converted`; `rows` of the vocabulary count."""
    ours, theirs = converted.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        ours_here = ours[name][:rows] if "embed_tokens" in name or "lm_head" in name else ours[name]
        assert torch.equal(ours_here, tensor), name


def shard(folder: Path) -> list[str]:
    """Splits the folder's weights into three files with an index; returns their names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{part + 1}-of-00003.safetensors" for part in range(3)]
    keys = sorted(weights)
    weight_map = {key: names[index % 3] for index, key in enumerate(keys)}
    for part, name in enumerate(names):
        save_file({key: weights[key] for key in keys[part::3]}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names
