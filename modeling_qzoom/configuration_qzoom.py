"""Configuration of a Q-Zoom model: any supported vision-language model (VLM) plus the zoom options."""

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .backbones_qzoom import spec_for_config, spec_for_model_type
from .options_qzoom import OPTION_NAMES, ZoomOptions, check_presets, find_preset, python_number, validate_options


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
        position_alignment (`str`, *optional*):
            `"continuous"` (fractional positions inside the coarse image) or `"sequential"`. Default: continuous where
            the VLM has M-RoPE, sequential elsewhere.
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
        ValueError: unsupported VLM, `branch_layer + branch_depth` beyond the last layer, an option out of range, or
            a preset that is unknown, sets something else or holds such an option.
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
        **kwargs: Any,
    ) -> None:
        if vlm_config is None:
            vlm_config = {"model_type": "qwen2_5_vl"}
        if isinstance(vlm_config, dict):
            vlm_config = dict(vlm_config)
            model_type = vlm_config.pop("model_type", "qwen2_5_vl")
            spec_for_model_type(model_type)  # its error is the clearer one
            vlm_config = AutoConfig.for_model(model_type, **vlm_config)
        self.vlm_config: PreTrainedConfig = vlm_config
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
        self.effort = effort
        if not isinstance(presets, (dict, type(None))):
            raise ValueError(f"presets must be a dict of options by preset name, got {presets!r}.")
        self.presets = dict(presets or {})
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        spec = spec_for_config(vlm_config)
        self.image_mean = list(image_mean or spec.image_mean)
        self.image_std = list(image_std or spec.image_std)
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.lora_subfolder = lora_subfolder
        kwargs.setdefault("tie_word_embeddings", getattr(vlm_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        self._validate()

    def _validate(self) -> None:
        for name in ("branch_layer", "branch_depth"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number of decoder layers, got {value!r}.")
        spec = spec_for_config(self.vlm_config)
        num_layers = self.get_text_config().num_hidden_layers
        if self.branch_depth < 1 or self.branch_layer < 1:
            raise ValueError(
                f"branch_layer (K) and branch_depth (T) must be at least 1, got K={self.branch_layer}, "
                f"T={self.branch_depth}."
            )
        if self.branch_layer + self.branch_depth > num_layers:
            raise ValueError(
                f"branch_layer + branch_depth = {self.branch_layer} + {self.branch_depth} exceeds the VLM's "
                f"{num_layers} decoder layers; choose branch_layer ≤ {num_layers - self.branch_depth}."
            )
        for name in OPTION_NAMES:
            setattr(self, name, python_number(getattr(self, name)))  # JSON holds no NumPy scalars
        options = ZoomOptions(**{name: getattr(self, name) for name in OPTION_NAMES})
        validate_options(options, mrope=spec.mrope)
        self.presets = check_presets(self.presets, options, mrope=spec.mrope)
        find_preset(self.effort, self.presets)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The decoder's configuration, which caches, `generate` and trainers ask for."""
        return self.vlm_config.get_text_config(*args, **kwargs)

    @property
    def image_token_id(self) -> int:
        return self.vlm_config.image_token_id

    @property
    def video_token_id(self) -> int | None:
        return getattr(self.vlm_config, "video_token_id", None)

    @property
    def vision_config(self) -> PreTrainedConfig:
        return self.vlm_config.vision_config
