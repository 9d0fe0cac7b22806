"""Loading and saving: attach to a plain VLM, full checkpoints, and add-ons that hold the branches only."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_utils import PreTrainedModel

from .backbones_qzoom import spec_for_model_type
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import CheckpointError, InputError, UnsupportedError
from .hub_qzoom import hub_keywords
from .loading_addons_qzoom import holds_only_branches, with_base_files
from .loading_checks_qzoom import (
    check_is_qzoom,
    check_loading_info,
    check_vlm_complete,
    check_zoom_config,
    damage_keywords,
)
from .loading_fingerprints_qzoom import comparing_weights
from .loading_lora_qzoom import has_unmerged_lora, load_lora
from .loading_quantized_qzoom import (
    UNQUANTIZED,
    adopt_placement,
    adopt_quantizer,
    dense_state,
    execution_device,
    forget_unpacking,
    keep_output_embedding_dense,
    protect_from_quantization,
    restore_storage_format,
)
from .loading_weight_files_qzoom import check_weight_files, damage_named
from .saving_addons_qzoom import write_addon
from .saving_qzoom import FULL, check_target, staged
from .visor_router_qzoom import visor_of
from .zoom_branches_qzoom import GateBranch, RegionBranch, ZoomBranches
from .zoom_options_qzoom import NEW_CHECKPOINT


# at runtime the methods below reach transformers' through the class that they are mixed into
if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as _Base
else:
    _Base = object
Model = TypeVar("Model", bound="QZoomLoadingMixin")

AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def _attention_by_part(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration's attention implementations in the form that `attn_implementation=` takes."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    nested = {name: _attention_by_part(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    return {"": config._attn_implementation, **nested}


def image_statistics(name: str, **hub: Any) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of a repository's image processor, so that crops are normalised as its images are.

    Args:
        name: repository or folder.
        hub: where and how to look, as for `from_pretrained`.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name, **hub)
    except OSError:  # a folder with weights only
        return {}
    return {key: settings[key] for key in ("image_mean", "image_std") if settings.get(key)}


def _load_copy(target: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.state_dict().items():
            tensor.copy_(state[name].to(tensor.device, tensor.dtype))


def start_gate(gate: GateBranch, layers: Sequence[nn.Module], std: float) -> None:
    """Initialises a gate: its layers from the decoder's, its head with small random weights (paper III-B).

    Args:
        gate: the branch, which is changed.
        layers: decoder layers K … K+T-1.
        std: standard deviation of the head's weights.
    """
    for own, layer in zip(gate.layers, layers, strict=True):
        _load_copy(own, dense_state(layer))
    nn.init.normal_(gate.head.weight, std=std)
    nn.init.zeros_(gate.head.bias)


def start_region(region: RegionBranch, layers: Sequence[nn.Module], norm: nn.Module) -> None:
    """Initialises a region branch from the decoder's layers (paper III-C).

    Args:
        region: the branch, which is changed.
        layers: decoder layers K … K+T-1, of whose last one the scorer takes its part.
        norm: the decoder's last norm, for families whose branch has one.
    """
    for own, layer in zip(region.layers, layers[:-1], strict=True):
        _load_copy(own, dense_state(layer))
    last = dense_state(layers[-1])
    _load_copy(region.scorer, {name.removeprefix("self_attn."): part for name, part in last.items()})
    if region.norm is not None:
        _load_copy(region.norm, dense_state(norm))


class QZoomLoadingMixin(_Base):
    """`from_backbone`, strict `from_pretrained`, `save_pretrained`, `save_addon` and `merge_lora`."""

    vlm: PreTrainedModel
    zoom: ZoomBranches

    @classmethod
    def from_backbone(
        cls: type[Model],
        vlm: str | os.PathLike[str] | PreTrainedModel,
        *,
        branch_layer: int,
        branch_depth: int = 3,
        has_gate: bool = True,
        zoom_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Model:
        """Attaches fresh branches to a plain VLM; they are copies of its decoder layers K … K+T-1.

        Args:
            vlm: a loaded model (which becomes a part of the result), or a repository or folder to load one from.
            branch_layer: K, where the branches read.
            branch_depth: T, decoder layers of a branch.
            has_gate: also attach a gate.
            zoom_config: further `QZoomConfig` fields: thresholds, budgets, presets, image statistics. Zooming needs
                a budget, here (`max_tokens`) or in the call (`crop_max_tokens`). Image statistics are read from the
                folder where it holds an image processor, and are the family's otherwise. Branches are light and a
                zoomed row keeps a tenth of its coarse tokens above K, unless fields say otherwise (`gate_branch`,
                `region_branch`, `keep_share`).
            kwargs: `from_pretrained` arguments of the plain VLM (`dtype`, `device_map`, `quantization_config`, …) for
                a name. The branches stay in 16 bit, so that they can be trained; quantize them when they are done.

        Returns:
            A model in evaluation mode.

        Raises:
            CheckpointError: layers beyond the VLM's last one, or weights that are missing or damaged.
            InputError: an unknown field in `zoom_config`, or arguments of `from_pretrained` beside a loaded model.
            UnsupportedError: unsupported VLM, or a loaded model with LoRA adapters.
        """
        fields: dict[str, Any] = {"branch_layer": branch_layer, "branch_depth": branch_depth, "has_gate": has_gate}
        fields |= {**NEW_CHECKPOINT, **(zoom_config or {})}
        check_zoom_config(fields)
        if isinstance(vlm, nn.Module):
            if kwargs:
                raise InputError(f"{sorted(kwargs)} apply to a repository or folder, not to a loaded model.")
            return cls._around(vlm, fields)
        name = os.fspath(vlm)
        # the model type first: transformers' own message on one that it does not know would not help
        vlm_fields, _ = PreTrainedConfig.get_config_dict(name, **hub_keywords(kwargs, "subfolder"))
        if vlm_fields.get("model_type") == QZoomConfig.model_type:
            raise CheckpointError(f"{name} is a Q-Zoom checkpoint already; load it with from_pretrained.")
        spec_for_model_type(vlm_fields.get("model_type"))
        fields = {**image_statistics(name, **hub_keywords(kwargs, "subfolder")), **fields}
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = protect_from_quantization(kwargs["quantization_config"], ("lm_head",))
        with damage_named(name, **damage_keywords(kwargs)):
            plain, info = AutoModelForImageTextToText.from_pretrained(name, **{**kwargs, "output_loading_info": True})
        check_vlm_complete(name, info)
        fields.setdefault("base_model_name_or_path", os.path.abspath(name) if os.path.isdir(name) else name)
        fields.setdefault("base_model_revision", kwargs.get("revision"))
        return cls._around(plain, fields)

    @classmethod
    def _around(cls: type[Model], vlm: PreTrainedModel, fields: dict[str, Any]) -> Model:
        if has_unmerged_lora(vlm):
            raise UnsupportedError(
                "the VLM carries LoRA adapters, which the branches cannot copy; merge them first (merge_and_unload of "
                "peft), or attach the branches before the adapters."
            )
        attention = _attention_by_part(vlm.config)
        config = QZoomConfig(vlm_config=vlm.config, **fields)
        config._attn_implementation = {"": attention[""], "vlm_config": attention}
        with torch.device("meta"):
            model = cls(config)
        decoder = vlm.get_decoder()
        device = execution_device(decoder.layers[config.branch_layer - 1])
        model.vlm = vlm
        dtype = vlm.dtype if vlm.dtype.is_floating_point else torch.bfloat16
        model.zoom = ZoomBranches(config, decoder, config.backbone).to(device, dtype)
        visor = visor_of(config, decoder)
        model.visor = None if visor is None else visor.to(device, dtype)
        layers = decoder.layers[config.branch_layer : config.branch_layer + config.branch_depth]
        if model.zoom.gate is not None:
            start_gate(model.zoom.gate, layers, config.get_text_config().initializer_range)
        start_region(model.zoom.region, layers, decoder.norm)
        model.generation_config = copy.deepcopy(vlm.generation_config)
        config.base_model_name_or_path = config.base_model_name_or_path or vlm.config._name_or_path or None
        config.dtype = dtype
        adopt_placement(model, vlm, device)
        adopt_quantizer(model, vlm)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        output_loading_info: bool = False,
        base_model_name_or_path: str | os.PathLike[str] | None = None,
        check_base: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Loads a full checkpoint, an add-on together with the base model that it names, or either of them with an
        adapter of peft, whose folder then is named.

        Args:
            pretrained_model_name_or_path, args, kwargs: as for any model of transformers.
            output_loading_info: also return transformers' report of the load.
            base_model_name_or_path: where an add-on's base model is now.
            check_base: False puts an add-on on a base with other weights than it was made for, such as another
                training of that model.

        Returns:
            The model, in evaluation mode; with `output_loading_info` a pair of it and the report.

        Raises:
            CheckpointError: the folder holds a plain VLM, branch weights are missing or unexpected, a file is damaged,
                or an add-on's base cannot be found or is another one.
            ImportError: there is an adapter and peft is missing.
        """
        name = pretrained_model_name_or_path
        config = kwargs.get("config")
        adapted = None
        if not isinstance(config, PreTrainedConfig) and name is not None:
            adapted = check_is_qzoom(config or name, kwargs)
        if base_model_name_or_path is not None:
            base = os.fspath(base_model_name_or_path)
            if isinstance(config, PreTrainedConfig):
                kwargs["config"] = copy.deepcopy(config)
                kwargs["config"].base_model_name_or_path, kwargs["config"].base_model_revision = base, None
            else:
                kwargs |= {"base_model_name_or_path": base, "base_model_revision": None}
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = protect_from_quantization(kwargs["quantization_config"], UNQUANTIZED)
        with comparing_weights(check_base), damage_named(name, adapted, **damage_keywords(kwargs)):
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        check_loading_info(str(adapted or name), info)
        keep_output_embedding_dense(model)
        if model.config.lora_subfolder is not None:
            if getattr(model, "_hf_peft_config_loaded", False):
                raise CheckpointError(
                    f"{name}: the adapter there belongs to an add-on that has a LoRA adapter of its own; merge that "
                    "one first (merge_lora and save_pretrained of the add-on)."
                )
            if name is None:
                raise CheckpointError("this add-on has a LoRA adapter, which is read from its folder; pass its name.")
            load_lora(model, name, kwargs.get("subfolder", ""), **hub_keywords(kwargs))
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Adds the base model's files to those of an add-on, so that one pass loads both."""
        check_weight_files(checkpoint_files)
        if state_dict is None and checkpoint_files and holds_only_branches(checkpoint_files):
            checkpoint_files, load_config = with_base_files(model, checkpoint_files, load_config)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def _auto_map(self) -> dict[str, str]:
        def reference(owner: type) -> str:
            return f"{owner.__module__.split('.')[-1]}.{owner.__name__}"

        return {"AutoConfig": reference(type(self.config)), **dict.fromkeys(AUTO_CLASSES, reference(type(self)))}

    def _keep_generation_options(self) -> None:
        # from a generation config that was derived from a model config, transformers reads no zoom options back
        if self.generation_config is not None:
            self.generation_config._from_model_config = False

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves a full checkpoint: VLM, branches, configuration and code; arguments as for any model of transformers.

        Files are written beside those that they replace and take their places at the end.

        Raises:
            CheckpointError: the model was given to peft's `get_peft_model`, and its LoRA is not merged; or the folder
                is its base's or holds anything else than an earlier full checkpoint.
        """
        self.config.check_fields()
        if has_unmerged_lora(self) and not getattr(self, "_hf_peft_config_loaded", False):
            raise CheckpointError(
                "the model carries an unmerged LoRA adapter, whose weights a full checkpoint has no place for. "
                "save_addon(folder) keeps branches and adapter; merge_lora() makes it a model that can be saved here."
            )
        # transformers records only the class through which a model was loaded
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **self._auto_map()}
        self.config.lora_subfolder = None
        self._keep_generation_options()
        restore_storage_format(self)
        forget_unpacking(self)
        is_main = args[0] if args else kwargs.get("is_main_process", True)
        if is_main and not getattr(self, "_hf_peft_config_loaded", False):  # of an adapted model, only the adapter
            bases = (self.config.base_model_name_or_path, self.config.vlm_config._name_or_path)
            check_target(save_directory, FULL, bases)
        # where several processes write one checkpoint, they have to meet in one folder
        is_shared = (
            kwargs.get("distributed_checkpoint") or getattr(self.config, "distributed_config", None) is not None
        )
        if is_shared or not is_main:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with staged(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)

    def save_addon(
        self,
        save_directory: str | os.PathLike[str],
        *,
        base_model_name_or_path: str | os.PathLike[str] | None = None,
        base_model_revision: str | None = None,
    ) -> None:
        """Saves what this model adds to its base: branches, unmerged LoRA adapter, configuration and code.

        `from_pretrained(save_directory)` loads base and add-on in one go. Weights are saved in 16 or 32 bit, also from
        a quantized model; ask for quantization again when loading.

        Args:
            save_directory: created if missing.
            base_model_name_or_path: the plain VLM that this model was made from, as users of the add-on reach it; by
                default what the config says.
            base_model_revision: its revision; by default the config's, if its base is taken from there too.

        Raises:
            CheckpointError: no base is known, it cannot be read, or the VLM's weights are no longer those of the base.
        """
        base, revision = self.config.base_model_name_or_path, self.config.base_model_revision
        if base_model_name_or_path is not None:
            base, revision = os.fspath(base_model_name_or_path), None
        revision = base_model_revision or revision
        if base is None:
            raise CheckpointError("no base model is known; pass save_addon(…, base_model_name_or_path=…).")
        self._keep_generation_options()
        write_addon(self, Path(save_directory), base, revision, self._auto_map())

    def merge_lora(self) -> None:
        """Adds an unmerged LoRA adapter to the weights it belongs to and takes it off; nothing to do without one.

        Raises:
            UnsupportedError: weights are offloaded, so there is nothing to add to.
        """
        if not has_unmerged_lora(self):
            return
        if any(parameter.is_meta for parameter in self.parameters()):
            raise UnsupportedError(
                "offloaded weights cannot take a LoRA in; load the model without offloading to merge."
            )
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        restore_storage_format(self)
        if hasattr(self.vlm, "get_base_model"):
            self.vlm = self.vlm.get_base_model()
        for name, module in list(self.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=True)
                self.set_submodule(name, module.get_base_layer())
            elif isinstance(module, ModulesToSaveWrapper):
                self.set_submodule(name, next(iter(module.modules_to_save.values())))
        for owner in (self, self.vlm):
            owner.__dict__.pop("peft_config", None)
            owner._hf_peft_config_loaded = False
