"""Loading and saving: attach to a plain VLM, full checkpoints, and add-ons that hold the branches only."""

import copy
import json
import os
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from .backbones_qzoom import spec_for_config
from .branches_qzoom import ZoomBranches
from .configuration_qzoom import QZoomConfig


# never quantized: one-row head, attention-free scorer and the output embedding lose most and save least
UNQUANTIZED = ["lm_head", "zoom.gate.head", "zoom.region.scorer"]


def _is_plain_vlm(config_dict: dict[str, Any]) -> bool:
    return config_dict.get("model_type") != QZoomConfig.model_type


def protect_from_quantization(quantization_config, names: list[str]):
    """A copy of a bitsandbytes configuration whose skip list holds `names` besides the caller's own.

    Args:
        quantization_config: `BitsAndBytesConfig`, its dict form, or None. Other methods are returned unchanged.
    """
    if quantization_config is None:
        return None
    protected = copy.deepcopy(quantization_config)
    if isinstance(protected, dict):
        if protected.get("quant_method", "bitsandbytes") == "bitsandbytes":
            own = protected.get("llm_int8_skip_modules") or []
            protected["llm_int8_skip_modules"] = list(dict.fromkeys([*own, *names]))
    elif hasattr(protected, "llm_int8_skip_modules"):
        own = protected.llm_int8_skip_modules or []
        protected.llm_int8_skip_modules = list(dict.fromkeys([*own, *names]))
    return protected


def _lift_quantization(config: QZoomConfig, names: list[str]) -> None:
    """Moves a pre-quantized VLM's recipe to the top level, where loading looks for it, with prefixed names."""
    recipe = getattr(config.vlm_config, "quantization_config", None)
    if recipe is None:
        return
    recipe = dict(recipe) if isinstance(recipe, dict) else recipe.to_dict()
    own = recipe.get("llm_int8_skip_modules") or []
    recipe["llm_int8_skip_modules"] = [f"vlm.{name}" for name in own]
    config.quantization_config = protect_from_quantization(recipe, names)
    del config.vlm_config.quantization_config


def _dense_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights, dequantized where they are in 4 or 8 bit and fetched where they are offloaded."""
    from accelerate.utils import align_module_device

    state: dict[str, Tensor] = {}
    for name, child in module.named_modules():
        own = dict(child.named_parameters(recurse=False))
        if not own:
            continue
        with align_module_device(child):
            for key, parameter in child.named_parameters(recurse=False):
                full_name = f"{name}.{key}" if name else key
                if parameter.is_floating_point() or parameter.dtype.is_complex:
                    state[full_name] = parameter.detach().clone()
                else:
                    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

                    state[full_name] = dequantize_bnb_weight(parameter, getattr(child, "state", None))
    return state


def _load_copy(target: nn.Module, state: dict[str, Tensor]) -> None:
    own = target.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name].to(tensor.device, tensor.dtype))


def copy_branches_from_decoder(branches: ZoomBranches, decoder: nn.Module, first: int, depth: int) -> None:
    """Initialises both branches from decoder layers [first, first + depth) (paper III-B and III-C)."""
    for index in range(depth):
        state = _dense_state(decoder.layers[first + index])
        if branches.gate is not None:
            _load_copy(branches.gate.layers[index], state)
        if index < depth - 1:
            _load_copy(branches.region.layers[index], state)
            continue
        flat = {name.removeprefix("self_attn."): tensor for name, tensor in state.items()}
        _load_copy(branches.region.scorer, flat)
    if branches.region.norm is not None:
        _load_copy(branches.region.norm, _dense_state(decoder.norm))


class QZoomLoadingMixin:
    """`from_backbone`, strict `from_pretrained` and `save_addon`."""

    @classmethod
    def from_backbone(
        cls,
        vlm: str | os.PathLike | PreTrainedModel,
        *,
        branch_layer: int,
        branch_depth: int = 3,
        has_gate: bool = True,
        zoom_config: dict[str, Any] | None = None,
        **kwargs,
    ):
        """Attaches fresh branches to a plain VLM; they are copies of its decoder layers K … K+T-1.

        Args:
            vlm: a loaded model, or a repository or folder to load one from.
            branch_layer: K, where the branches read.
            branch_depth: T, decoder layers of a branch.
            has_gate: also attach a gate.
            zoom_config: further `QZoomConfig` fields: thresholds, budgets, presets, image statistics.
            kwargs: `from_pretrained` arguments (`dtype`, `device_map`, `quantization_config`, …) for a name. The
                branches stay in 16 bit, so that they can be trained; quantize them when they are done.

        Returns:
            A model in evaluation mode.

        Raises:
            ValueError: unsupported VLM, or layers beyond its last one.
        """
        fields = {"branch_layer": branch_layer, "branch_depth": branch_depth, "has_gate": has_gate}
        fields |= zoom_config or {}
        if isinstance(vlm, nn.Module):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)} apply to a repository or folder, not to a loaded model.")
            return cls._around(vlm, QZoomConfig(vlm_config=vlm.config, **fields))
        name = os.fspath(vlm)
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        vlm_config = AutoConfig.from_pretrained(name, **hub)
        fields.setdefault("base_model_name_or_path", name)
        fields.setdefault("base_model_revision", kwargs.get("revision"))
        config = QZoomConfig(vlm_config=vlm_config, **fields)
        _lift_quantization(config, ["lm_head", "zoom"])
        if "quantization_config" in kwargs:
            kwargs["quantization_config"] = protect_from_quantization(
                kwargs["quantization_config"], ["lm_head", "zoom"]
            )
        model, info = super().from_pretrained(name, config=config, output_loading_info=True, **kwargs)
        lost = sorted(key for key in info["missing_keys"] if not key.startswith("zoom."))
        if lost:
            raise ValueError(f"{name} lacks {len(lost)} weights of the VLM, e.g. {lost[:3]}.")
        copy_branches_from_decoder(model.zoom, model.get_decoder(), branch_layer, branch_depth)
        return model.eval()

    @classmethod
    def _around(cls, vlm: PreTrainedModel, config: QZoomConfig):
        with torch.device("meta"):
            model = cls(config)
        decoder = vlm.get_decoder()
        device = next(decoder.layers[config.branch_layer].parameters()).device
        model.vlm = vlm
        dtype = vlm.dtype if vlm.dtype.is_floating_point else torch.bfloat16
        model.zoom = ZoomBranches(config, decoder, spec_for_config(config.vlm_config)).to(
            "cpu" if device.type == "meta" else device, dtype
        )
        if model.zoom.gate is not None:
            nn.init.normal_(model.zoom.gate.head.weight, std=config.get_text_config().initializer_range)
            nn.init.zeros_(model.zoom.gate.head.bias)
        copy_branches_from_decoder(model.zoom, decoder, config.branch_layer, config.branch_depth)
        model.generation_config = copy.deepcopy(vlm.generation_config)
        config.base_model_name_or_path = config.base_model_name_or_path or vlm.config._name_or_path or None
        config.dtype = dtype
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Loads a full checkpoint, or an add-on together with the base model that it names.

        Args:
            pretrained_model_name_or_path, args, kwargs: as for any model of transformers.
            output_loading_info: also return transformers' report of the load.

        Raises:
            ValueError: the folder holds a plain VLM, or branch weights are missing or unexpected.
        """
        name = pretrained_model_name_or_path
        if kwargs.get("config") is None and name is not None:
            keys = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
            hub = {key: kwargs[key] for key in keys if key in kwargs}
            found, _ = PreTrainedConfig.get_config_dict(name, **hub)
            if _is_plain_vlm(found):
                raise ValueError(
                    f"{name} holds a plain {found.get('model_type')!r} model, not a Q-Zoom checkpoint; attach fresh "
                    "branches with QZoomForConditionalGeneration.from_backbone(name, branch_layer=…)."
                )
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = protect_from_quantization(kwargs["quantization_config"], UNQUANTIZED)
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        for kind, meaning in (("missing_keys", "lacks"), ("unexpected_keys", "holds unknown")):
            wrong = sorted(key for key in info[kind] if key.startswith("zoom."))
            if wrong:
                raise ValueError(
                    f"{name} {meaning} branch weights, so its branches would be random or incomplete: {wrong[:4]}"
                    f"{' …' if len(wrong) > 4 else ''} ({len(wrong)} in all). Check branch_layer, branch_depth and has_gate "
                    "in its config, or attach fresh branches with from_backbone."
                )
        lost = sorted(key for key in info["missing_keys"] if key.startswith("vlm."))
        if lost:
            raise ValueError(f"{name} lacks {len(lost)} weights of the VLM, e.g. {lost[:3]}.")
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Adds the base model's files to those of an add-on, so that one pass loads both."""
        base = model.config.base_model_name_or_path
        if checkpoint_files and base and not _holds_vlm(checkpoint_files):
            checkpoint_files = [*checkpoint_files, *_base_files(model, base, load_config)]
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


def _holds_vlm(checkpoint_files: list[str]) -> bool:
    for file in checkpoint_files:
        with safe_open(file, "pt") as weights:
            if any(not key.startswith("zoom.") for key in weights.keys()):
                return True
    return False


def _base_files(model, base: str, load_config) -> list[str]:
    """The safetensors files of the base repository or folder."""
    hub = {"revision": model.config.base_model_revision}
    download = getattr(load_config, "download_kwargs", None) or {}
    hub |= {key: download[key] for key in ("token", "cache_dir", "local_files_only") if download.get(key) is not None}
    single = cached_file(base, "model.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
    if single is not None:
        return [single]
    index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        raise ValueError(
            f"this add-on needs its base model {base!r}, but no safetensors files were found there. If it has moved, pass "
            "base_model_name_or_path=… to from_pretrained."
        )
    with open(index) as file:
        names = sorted(set(json.load(file)["weight_map"].values()))
    return [cached_file(base, name, **hub) for name in names]
