"""Configuration of a Q-Zoom model: any supported vision-language model (VLM) plus the zoom options."""

import inspect
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .backbones_qzoom import BackboneSpec, spec_for_config
from .configuration_fields_qzoom import as_json, as_vlm_config, checked_statistics
from .errors_qzoom import CheckpointError, InputError
from .messages_qzoom import similar
from .visor_configurations_qzoom import DENSE, check_router, check_visor, is_routed, layer_kinds
from .zoom_options_qzoom import (
    OPTION_NAMES,
    ZoomOptions,
    check_order,
    check_presets,
    check_tokens,
    find_preset,
    python_number,
    validate_options,
)


# what the VLM's configuration says and this one only repeats
_OF_THE_VLM = ("text_config", "vision_config", "image_token_id", "video_token_id")
# closer than foreign names that resemble ours, such as "image_size" to "image_std"
_MISSPELT = 0.8


def own_fields() -> set[str]:
    """Names of the fields that `QZoomConfig` adds to those of transformers."""
    return set(inspect.signature(QZoomConfig.__init__).parameters) - {"self", "kwargs"}


def refuse_misspelt(names: Iterable[str]) -> None:
    """Refuses names that are no fields but nearly are; other foreign names pass.

    Raises:
        CheckpointError: names the field that was meant.
    """
    known = own_fields()
    for name in set(names) - known:
        close = similar(name.replace("-", "_"), known, _MISSPELT)
        if close and not name.startswith("_"):
            raise CheckpointError(f"a Q-Zoom config has no field {name!r}; did you mean {close[0]!r}?")


class QZoomConfig(PreTrainedConfig):
    r"""Composite configuration: the VLM's own configuration and what Q-Zoom adds to it.

    Args:
        vlm_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the wrapped VLM (Qwen2.5-VL, Qwen3-VL or LLaVA-1.5). Defaults to Qwen2.5-VL's.
        branch_layer (`int`, *optional*, defaults to 18):
            K: both branches read the hidden states that decoder layer K (0-based) would receive.
        branch_depth (`int`, *optional*, defaults to 3):
            T: decoder layers of a branch. The region branch uses only the norm, query and key projections of its last.
        has_gate (`bool`, *optional*, defaults to `True`):
            Whether the checkpoint holds a gate. Without one (SD-RPN), `zoom="auto"` zooms every row.
        zoom (`str`, *optional*, defaults to `"auto"`): `"auto"`, `"always"` or `"never"`.
        gate_threshold (`float`, *optional*, defaults to 0.1):
            `"auto"` zooms a row when its gate probability reaches this value (0: always, above 1: never).
        region_threshold (`float`, *optional*, defaults to 0.1):
            A cell of the heat map belongs to the region when it is above this value.
        region_threshold_mode (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"`, or `"peak"`: the threshold is a share of the map's largest value.
        crop_min_tokens, crop_max_tokens (`int`, *optional*):
            Budget of the crop in merged visual tokens. Default: `min_tokens` and `max_tokens`.
        crop_budget (`str`, *optional*, defaults to `"fixed"`):
            How a crop is sized within these bounds. `"fixed"`: its region's native size. `"need"`: that, and small
            regions are enlarged, at most threefold a side and up to `crop_target_tokens`; the lower bound is 64
            tokens where it is not set, and it wins over the threefold. `"visionrl2"`: as `"need"`, but to the pixel
            as Vision-RL² does it, whose rounding may exceed the upper bound by a row and a column. What is not set is
            its own: 64 tokens, a target of 160 (256 from a `max_tokens` of 1024 on, 384 from 2048 on), and an upper
            bound of three targets, or half of `max_tokens` where that is less.
        crop_target_tokens (`int`, *optional*):
            Up to how many tokens a small region is enlarged. Default: `crop_max_tokens`, or `max_tokens`.
        region_blur (`str`, *optional*, defaults to `"fixed"`):
            Gaussian blur of the heat map: `"fixed"`: 3 × 3 cells, sigma 1; `"grid"`: sigma grows from 1 on grids of
            up to 512 cells to 4 on grids of 8192.
        region_min_peak, region_min_contrast (`float`, *optional*, defaults to 0):
            A row is not zoomed when its map's largest value is below the first, or, divided by the map's mean, below
            the second.
        position_alignment (`str`, *optional*):
            `"continuous"` (fractional positions inside the coarse image) or `"sequential"`. Default: continuous where
            the VLM has M-RoPE, sequential elsewhere.
        gate_branch, region_branch (`str`, *optional*, defaults to `"full"`):
            `"light"`: in the branch's layers text is updated and visual tokens only give keys and values, as they
            are after layer K. The gate bears it untrained; a region branch must be trained so.
        keep_share (`float`, *optional*, defaults to 1.0):
            Share of the zoomed image's coarse tokens that a zooming row keeps above layer K: the hottest of the heat
            map, those in and around the region first. The others are absent there, and positions keep their holes.
        keep_margin (`int`, *optional*, defaults to 1):
            Cells around the region that count as part of it when `keep_share` is below 1.
        skip_unread (`bool`, *optional*):
            Whether the last decoder layer of a prefill, and the gate's, update only the token that is read, and rows
            that begin with the same tokens and image run them once (not with `zoom="never"`). It changes no result
            beyond rounding. Default: yes where a call may zoom, no with `zoom="never"`.
        vision (`str`, *optional*, defaults to `"dense"`):
            Which decoder layers visual tokens take part in: `"dense"` (all of them, the plain model) or the name of a
            configuration of `visor`; `"auto"`: its router chooses.
        visor (`dict`, *optional*):
            VISOR: `{"configurations": {name: letters}}` with one letter a decoder layer, and where a router chooses
            `"router": {"layer": …, "choices": [names]}`; see `visor_configurations_qzoom`.
        effort (`str`, *optional*):
            Name of the preset that is in force by default; what it sets wins over the fields above.
        presets (`dict[str, dict]`, *optional*):
            Option values by preset name, e.g. `{"fast": {"gate_threshold": 0.5}}`.
        min_tokens, max_tokens (`int`, *optional*): the coarse budget that the checkpoint was made for, in tokens.
        image_mean, image_std (`list[float]`, *optional*): channel statistics that pixel values are normalised with.
        base_model_name_or_path (`str`, *optional*):
            The plain VLM's repository or folder. An add-on checkpoint, which holds the branches only, needs it.
        base_model_revision (`str`, *optional*): revision of `base_model_name_or_path`.
        lora_subfolder (`str`, *optional*): where an add-on keeps the LoRA adapter that belongs to it.

    Raises:
        CheckpointError: `branch_layer + branch_depth` beyond the last layer, a field of the wrong type or out of
            range, a misspelt one, a preset that is unknown, sets something else or holds such an option, or
            `tie_word_embeddings` other than the VLM's.
        UnsupportedError: a VLM of a family that Q-Zoom does not know.
    """

    model_type = "qzoom"
    sub_configs = {"vlm_config": AutoConfig}
    # what Trainer leaves out of predictions: all that does not have one entry a row, or one size in every batch
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "image_outputs",
        "video_outputs",
        "image_hidden_states",
        "rope_deltas",
        "region_loss",
        "gate_loss",
        "region_logits",
    ]

    def __init__(
        self,
        vlm_config: dict[str, Any] | PreTrainedConfig | None = None,
        branch_layer: int = 18,
        branch_depth: int = 3,
        has_gate: bool = True,
        zoom: str = "auto",
        gate_threshold: float = 0.1,
        region_threshold: float = 0.1,
        region_threshold_mode: str = "absolute",
        crop_min_tokens: int | None = None,
        crop_max_tokens: int | None = None,
        position_alignment: str | None = None,
        effort: str | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        lora_subfolder: str | None = None,
        crop_budget: str = "fixed",
        crop_target_tokens: int | None = None,
        region_blur: str = "fixed",
        region_min_peak: float = 0.0,
        region_min_contrast: float = 0.0,
        gate_branch: str = "full",
        region_branch: str = "full",
        keep_share: float = 1.0,
        keep_margin: int = 1,
        skip_unread: bool | None = None,
        vision: str = "dense",
        visor: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_misspelt(kwargs)
        tied = kwargs.pop("tie_word_embeddings", None)
        if tied is not None and (vlm_config is None or isinstance(vlm_config, dict)):
            vlm_config = {"tie_word_embeddings": tied, **(vlm_config or {})}
        self.vlm_config: PreTrainedConfig = as_vlm_config(vlm_config)
        spec = spec_for_config(self.vlm_config)
        if tied is not None and tied != self.tie_word_embeddings:
            raise CheckpointError(
                f"tie_word_embeddings={tied!r}, but vlm_config, which decides, says {self.tie_word_embeddings}; set "
                "it there."
            )
        for name in _OF_THE_VLM:
            if name in kwargs and as_json(kwargs.pop(name)) != as_json(getattr(self, name)):
                raise CheckpointError(f"{name} is the VLM's own and belongs into vlm_config, which says otherwise.")
        self.branch_layer = branch_layer
        self.branch_depth = branch_depth
        self.has_gate = has_gate
        self.zoom = zoom
        self.gate_threshold = gate_threshold
        self.region_threshold = region_threshold
        self.region_threshold_mode = region_threshold_mode
        self.crop_min_tokens = crop_min_tokens
        self.crop_max_tokens = crop_max_tokens
        self.position_alignment = position_alignment
        self.gate_branch = gate_branch
        self.region_branch = region_branch
        self.keep_share = keep_share
        self.keep_margin = keep_margin
        self.skip_unread = skip_unread
        self.vision = vision
        self.visor = visor
        self.crop_budget = crop_budget
        self.crop_target_tokens = crop_target_tokens
        self.region_blur = region_blur
        self.region_min_peak = region_min_peak
        self.region_min_contrast = region_min_contrast
        self.effort = effort
        self.presets: dict[str, dict[str, Any]] = {} if presets is None else presets
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        self.image_mean: list[float] = list(spec.image_mean) if image_mean is None else image_mean
        self.image_std: list[float] = list(spec.image_std) if image_std is None else image_std
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.lora_subfolder = lora_subfolder
        super().__init__(**kwargs)
        self.check_fields()

    def check_fields(self) -> None:
        """Checks every field; what was assigned since is checked when a model is built or anything is saved.

        Raises:
            CheckpointError: a field does not hold; names it.
        """
        if not isinstance(self.vlm_config, PreTrainedConfig):
            raise CheckpointError(f"vlm_config must be a configuration of transformers, got {self.vlm_config!r}.")
        for name in ("branch_layer", "branch_depth"):
            setattr(self, name, python_number(getattr(self, name)))
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise CheckpointError(f"{name} must be a whole number of decoder layers, got {value!r}.")
        num_layers = self.get_text_config().num_hidden_layers
        if self.branch_depth < 1 or self.branch_layer < 1:
            raise CheckpointError(
                f"branch_layer (K) and branch_depth (T) must be at least 1, got K={self.branch_layer}, "
                f"T={self.branch_depth}."
            )
        if self.branch_layer + self.branch_depth > num_layers:
            raise CheckpointError(
                f"branch_layer + branch_depth = {self.branch_layer} + {self.branch_depth} exceeds the VLM's "
                f"{num_layers} decoder layers; choose branch_layer ≤ {num_layers - self.branch_depth}."
            )
        if not isinstance(self.has_gate, bool):
            raise CheckpointError(f"has_gate must be True or False, got {self.has_gate!r}.")
        for name in ("image_mean", "image_std"):
            setattr(self, name, checked_statistics(name, getattr(self, name)))
        self._check_places()
        if not isinstance(self.presets, dict) or not all(isinstance(name, str) for name in self.presets):
            raise CheckpointError(f"presets must be a dict of options by preset name, got {self.presets!r}.")
        try:
            self._check_budget()
            check_visor(self.visor, num_layers)
            check_router(self.visor, num_layers)
            self._check_options()
        except InputError as error:  # the same values are a call's there, and a checkpoint's here
            raise CheckpointError(str(error)) from error

    def _check_options(self) -> None:
        mrope = self.backbone.mrope
        for name in OPTION_NAMES:
            setattr(self, name, python_number(getattr(self, name)))  # JSON holds no NumPy scalars
        options = ZoomOptions(**{name: getattr(self, name) for name in OPTION_NAMES})
        validate_options(options, mrope=mrope)
        self.presets = check_presets(self.presets, options, mrope=mrope)
        find_preset(self.effort, self.presets)
        for name in (holder.get("vision") or DENSE for holder in (vars(self), *self.presets.values())):
            if not isinstance(name, str):
                raise CheckpointError(f"vision must be the name of one configuration, got {name!r}.")
            if not is_routed(self.visor, name):
                layer_kinds(self.visor, name)

    def _check_budget(self) -> None:
        for name in ("min_tokens", "max_tokens"):
            setattr(self, name, python_number(getattr(self, name)))
            check_tokens(name, getattr(self, name))
        check_order(("min_tokens", "max_tokens"), self.min_tokens, self.max_tokens)

    def _check_places(self) -> None:
        for name in ("base_model_name_or_path", "base_model_revision", "lora_subfolder"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                setattr(self, name, value)
            if value is not None and (not isinstance(value, str) or not value):
                raise CheckpointError(f"{name} must be a name or None, got {value!r}.")
        place = PurePosixPath((self.lora_subfolder or "lora").replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts:
            raise CheckpointError(f"lora_subfolder must be a folder inside the add-on's, got {self.lora_subfolder!r}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for any configuration of transformers; fields that `kwargs` replace are checked like the others."""
        refuse_misspelt(kwargs)
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).check_fields()
        return result

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the decoder's configuration where readers of plain VLM configurations look for it."""
        decoder = self.text_config.to_dict()
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings, "text_config": decoder}

    def to_diff_dict(self) -> dict[str, Any]:
        """What a saved file holds."""
        return {name: value for name, value in super().to_diff_dict().items() if name != "text_config"}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As for any configuration of transformers.

        Raises:
            CheckpointError: a field does not hold, or the folder holds another model's config.json.
        """
        self.check_fields()
        path = Path(save_directory) / "config.json"
        if path.is_file():
            try:
                model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
            except (ValueError, AttributeError):
                model_type = None
            if model_type != self.model_type:
                raise CheckpointError(
                    f"{path} is not that of a Q-Zoom model (model_type {model_type!r}), and saving would overwrite "
                    "it; choose another folder."
                )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether input and output embedding are one weight; assigning it changes the VLM's configuration."""
        return bool(getattr(self.vlm_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise CheckpointError(f"tie_word_embeddings must be True or False, got {value!r}.")
        for config in (self.vlm_config, self.get_text_config()):
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = value

    @property
    def text_config(self) -> PreTrainedConfig:
        """The decoder's configuration, by the name that it has in a plain VLM's."""
        return self.get_text_config()

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The decoder's configuration, which caches, `generate` and trainers ask for."""
        return self.vlm_config.get_text_config(*args, **kwargs)

    @property
    def backbone(self) -> BackboneSpec:
        """What Q-Zoom knows of the wrapped VLM's family."""
        return spec_for_config(self.vlm_config)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder of one visual token of an image."""
        return self.vlm_config.image_token_id

    @property
    def video_token_id(self) -> int | None:
        """Id of the placeholder of one visual token of a video; None where the VLM knows no videos."""
        return getattr(self.vlm_config, "video_token_id", None)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The vision tower's configuration, by the name that it has in a plain VLM's."""
        return self.vlm_config.vision_config
