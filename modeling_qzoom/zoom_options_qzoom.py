"""The zoom options of one call: their names, their validation and the order in which their sources win."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from .errors_qzoom import InputError, UnsupportedError
from .messages_qzoom import close_miss, shown


ZOOM_MODES = ("auto", "always", "never")
THRESHOLD_MODES = ("absolute", "peak")
ALIGNMENTS = ("continuous", "sequential")
BRANCHES = ("full", "light")
# what a model starts with whose branches are trained here: the demo loses nothing by it (hub_release/demo/REPORT.md)
NEW_CHECKPOINT = {"gate_branch": "light", "region_branch": "light", "keep_share": 0.1}
CROP_BOUNDS = ("crop_min_tokens", "crop_max_tokens")
CROP_BUDGETS = ("fixed", "need", "visionrl2")
BLURS = ("fixed", "grid")


@dataclass(frozen=True)
class ZoomOptions:
    """Resolved options; see `QZoomConfig` for their meaning."""

    zoom: str = "auto"
    gate_threshold: float = 0.1
    region_threshold: float = 0.1
    region_threshold_mode: str = "absolute"
    crop_min_tokens: int | None = None
    crop_max_tokens: int | None = None
    position_alignment: str | None = None
    crop_budget: str = "fixed"
    crop_target_tokens: int | None = None
    region_blur: str = "fixed"
    region_min_peak: float = 0.0
    region_min_contrast: float = 0.0
    gate_branch: str = "full"
    region_branch: str = "full"
    keep_share: float = 1.0
    keep_margin: int = 1
    skip_unread: bool | None = None
    vision: str | Sequence[str] = "dense"

    @property
    def skips_unread(self) -> bool:
        """Whether tokens that nobody reads are left out of the last layer of a prefill that may zoom."""
        return self.skip_unread is not False


OPTION_NAMES = tuple(field.name for field in fields(ZoomOptions))
# every name that a generation config may carry for us
SETTING_NAMES = (*OPTION_NAMES, "effort", "return_zoom_reports")


def python_number(value: Any) -> Any:
    """A number of any library (`np.float32`, `np.int64`, ...) as int or float; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:  # a fraction beyond what a float holds
        return math.inf


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {list(choices)}, got {shown(value)}.")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _check_number(name: str, value: Any, low: float, meaning: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not _is_finite(value) or value < low:
        raise InputError(f"{name} must be a finite number ≥ {low:g} ({meaning}), got {shown(value)}.")


def check_tokens(name: str, value: Any) -> None:
    """Checks a bound of a budget in merged visual tokens.

    Args:
        name: name of the bound, for the message.
        value: the bound; None leaves it open.

    Raises:
        InputError: no positive whole number.
    """
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
        raise InputError(f"{name} must be a positive number of merged visual tokens or None, got {shown(value)}.")


def check_order(names: tuple[str, str], low: int | None, high: int | None) -> None:
    """Checks that the bounds of a budget do not cross.

    Args:
        names: names of the lower and the upper bound, for the message.
        low, high: the bounds; None leaves one open.

    Raises:
        InputError: the lower bound is larger.
    """
    if low is not None and high is not None and low > high:
        raise InputError(f"{names[0]} ({low}) is larger than {names[1]} ({high}).")


def check_capacity(options: ZoomOptions, config: PreTrainedConfig) -> None:
    """Checks the crop's budget against the length that the decoder was made for.

    Args:
        config: the model's `QZoomConfig`.

    Raises:
        InputError: a bound is larger than any sequence may be.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    for name in (*CROP_BOUNDS, "crop_target_tokens"):
        value = getattr(options, name)
        if value is not None and positions is not None and value > positions:
            raise InputError(
                f"{name} is {shown(value)}, but this model's sequences hold at most {positions} tokens "
                "(max_position_embeddings), the prompt and the answer included. Set a smaller budget."
            )


def check_generation_config(entry: Any) -> None:
    """Looks for options that a generation config would carry without effect.

    Raises:
        InputError: an attribute that is nearly one of our options (nobody else's is called after zooming).
        TypeError: no generation config at all.
    """
    if not isinstance(entry, GenerationConfig):
        raise TypeError(
            f"generation_config must be a GenerationConfig, got a {type(entry).__name__}; "
            "GenerationConfig(**options) makes one."
        )
    stock = vars(GenerationConfig())
    for name, value in vars(entry).items():
        if name in SETTING_NAMES or name in stock or name.startswith("_") or value is None:
            continue
        meant = close_miss(name, SETTING_NAMES)
        if meant is not None or "zoom" in name.lower():
            hint = f"did you mean {meant}?" if meant else f"the options are {sorted(SETTING_NAMES)}."
            raise InputError(f"the generation config sets {name!r}, which is no option of Q-Zoom; {hint}")


def resolve_reports(of_call: bool | None, generation_configs: Sequence[GenerationConfig]) -> bool:
    """Whether a call returns reports: as it says itself, else as the generation configs do.

    Raises:
        InputError: neither True nor False.
    """
    settings = (of_call, *(getattr(entry, "return_zoom_reports", None) for entry in generation_configs))
    for value in settings:
        if value is not None and not isinstance(value, bool):
            raise InputError(f"return_zoom_reports must be True or False, got {shown(value)}.")
    return next((value for value in settings if value is not None), False)


def validate_options(options: ZoomOptions, *, mrope: bool) -> None:
    """Checks ranges and combinations of resolved options.

    Args:
        mrope: whether the backbone has fractional (M-RoPE) positions.

    Raises:
        InputError: a value is out of range, or two do not fit each other; names the option.
        UnsupportedError: continuous positions for a backbone without M-RoPE.
    """
    _check_choice("zoom", options.zoom, ZOOM_MODES)
    _check_choice("region_threshold_mode", options.region_threshold_mode, THRESHOLD_MODES)
    _check_number("gate_threshold", options.gate_threshold, 0.0, "0 always zooms, above 1 never")
    _check_number("region_threshold", options.region_threshold, 0.0, "a heat-map value, or a share of the peak")
    _check_choice("region_blur", options.region_blur, BLURS)
    _check_number("region_min_peak", options.region_min_peak, 0.0, "a heat-map value; 0 accepts every map")
    _check_number("region_min_contrast", options.region_min_contrast, 0.0, "peak over mean; 0 accepts every map")
    _check_choice("crop_budget", options.crop_budget, CROP_BUDGETS)
    for name in (*CROP_BOUNDS, "crop_target_tokens"):
        check_tokens(name, getattr(options, name))
    check_order(CROP_BOUNDS, options.crop_min_tokens, options.crop_max_tokens)
    _check_choice("gate_branch", options.gate_branch, BRANCHES)
    _check_choice("region_branch", options.region_branch, BRANCHES)
    _check_number("keep_share", options.keep_share, 0.0, "the share of coarse tokens that a zoomed row keeps above K")
    if options.keep_share > 1:
        raise InputError(f"keep_share must be a share between 0 and 1, got {shown(options.keep_share)}.")
    if (
        not isinstance(options.keep_margin, Integral)
        or isinstance(options.keep_margin, bool)
        or options.keep_margin < 0
    ):
        raise InputError(f"keep_margin must be a whole number of cells, 0 or more, got {shown(options.keep_margin)}.")
    if options.skip_unread is not None and not isinstance(options.skip_unread, bool):
        raise InputError(f"skip_unread must be True, False or None, got {shown(options.skip_unread)}.")
    names = [options.vision] if isinstance(options.vision, str) else options.vision
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"vision must be a name, or one name a row, got {shown(options.vision)}.")
    if options.position_alignment is not None:
        _check_choice("position_alignment", options.position_alignment, ALIGNMENTS)
        if options.position_alignment == "continuous" and not mrope:
            raise UnsupportedError(
                "position_alignment='continuous' needs fractional (M-RoPE) positions, which this backbone does not "
                "have; leave the option out or pass 'sequential'."
            )


def _refuse_idle_target(options: ZoomOptions) -> None:
    """Refuses a target beside a budget that knows none."""
    if options.crop_target_tokens is not None and options.crop_budget == "fixed":
        raise InputError(
            "crop_target_tokens has no effect with crop_budget='fixed', which is in force here; set "
            "crop_budget='need' beside it, or set crop_max_tokens."
        )


def check_presets(
    presets: dict[str, dict[str, Any]], defaults: ZoomOptions, *, mrope: bool
) -> dict[str, dict[str, Any]]:
    """Checks a checkpoint's presets, each together with the options that it leaves alone.

    Returns:
        The presets with Python numbers, which JSON can hold.

    Raises:
        InputError: names the preset and what is wrong with it.
    """
    for name, preset in presets.items():
        if not isinstance(preset, dict):
            raise InputError(f"preset {name!r} must be a dict of options, got {preset!r}.")
        unknown = sorted(set(preset) - set(OPTION_NAMES))
        if unknown:
            raise InputError(f"preset {name!r} sets {unknown}; a preset may set {sorted(OPTION_NAMES)}.")
        values = {key: value for key, value in preset.items() if value is not None}
        try:
            options = replace(defaults, **values)
            validate_options(options, mrope=mrope)
            if "crop_target_tokens" in values:
                _refuse_idle_target(options)
        except ValueError as error:
            raise InputError(f"preset {name!r}: {error}") from error
    return {name: {key: python_number(value) for key, value in preset.items()} for name, preset in presets.items()}


def find_preset(effort: Any, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options of a preset; none for `effort=None`.

    Raises:
        InputError: the checkpoint has no such preset.
    """
    if effort is None:
        return {}
    if not isinstance(effort, str) or effort not in presets:
        known = sorted(presets) or "none; set thresholds and budgets one by one"
        raise InputError(f"effort={shown(effort)} is not a preset of this checkpoint (presets: {known}).")
    return presets[effort]


def _uncross_crop_bounds(resolved: dict[str, Any], ranks: dict[str, int]) -> None:
    """Where the crop's bounds cross, sets the one from the weaker source equal to the other; bounds from one source
    stay as they are, for `validate_options` to refuse.

    Args:
        resolved: option values by name.
        ranks: where each came from, 0 for the strongest source.
    """
    if not all(name in resolved for name in CROP_BOUNDS):
        return
    for name in CROP_BOUNDS:  # a bad bound must not move the other
        check_tokens(name, resolved[name])
    low, high = CROP_BOUNDS
    if resolved[low] > resolved[high] and ranks[low] != ranks[high]:
        strong, weak = sorted(CROP_BOUNDS, key=ranks.__getitem__)
        resolved[weak] = resolved[strong]


def resolve_options(
    call: dict[str, Any], generation_configs: Sequence[GenerationConfig], config: PreTrainedConfig, *, mrope: bool
) -> ZoomOptions:
    """The options of one call: its own win over those of the generation configs, and these over the model config's.

    In the call and in a generation config, an explicit option wins over the `effort` preset beside it. The model
    config always holds a value for every option, so there the preset, where one is named, wins over the values.
    A bound of the crop's budget moves the opposite one of a weaker source out of its way.

    Args:
        call: options of the call by name (`effort` included), None where not given.
        generation_configs: generation configs in force, the call's before the model's; their
            attributes may carry options.
        config: the model's `QZoomConfig`.

    Raises:
        InputError: unknown preset, a misspelt option in a generation config, a budget beyond the model's length, or
            a target without effect, or what `validate_options` refuses.
    """
    for entry in generation_configs:
        check_generation_config(entry)
    layers: list[dict[str, Any]] = []  # strongest first
    for source in (call, *(vars(entry) for entry in generation_configs)):
        layers += [source, find_preset(source.get("effort"), config.presets)]
    layers += [find_preset(config.effort, config.presets), vars(config)]
    resolved: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for rank, values in enumerate(layers):
        for name in OPTION_NAMES:
            if name not in resolved and values.get(name) is not None:
                resolved[name], ranks[name] = python_number(values[name]), rank
    _uncross_crop_bounds(resolved, ranks)
    options = ZoomOptions(**resolved)
    validate_options(options, mrope=mrope)
    stored = len(layers) - 1  # the model's config may hold a target for the calls that want one
    rank = ranks.get("crop_target_tokens", stored)
    if config.backbone.grid.has_budget and rank < stored and rank <= ranks.get("crop_budget", stored):
        _refuse_idle_target(options)
    check_capacity(options, config)
    return options
