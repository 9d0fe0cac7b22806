"""The zoom options of one call: their names, their validation and the order in which their sources win."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig


ZOOM_MODES = ("auto", "always", "never")
THRESHOLD_MODES = ("absolute", "peak")
ALIGNMENTS = ("continuous", "sequential")
CROP_BOUNDS = ("crop_min_tokens", "crop_max_tokens")


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


OPTION_NAMES = tuple(field.name for field in fields(ZoomOptions))


def python_number(value: Any) -> Any:
    """A number of any library (`np.float32`, `np.int64`, ...) as int or float; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")


def _check_number(name: str, value: Any, low: float, meaning: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < low:
        raise ValueError(f"{name} must be a finite number ≥ {low:g} ({meaning}), got {value!r}.")


def _check_tokens(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be a positive number of merged visual tokens or None, got {value!r}.")


def validate_options(options: ZoomOptions, *, mrope: bool) -> None:
    """Checks ranges and combinations.

    Args:
        mrope: whether the backbone has fractional (M-RoPE) positions.

    Raises:
        ValueError: a sentence per misuse.
    """
    _check_choice("zoom", options.zoom, ZOOM_MODES)
    _check_choice("region_threshold_mode", options.region_threshold_mode, THRESHOLD_MODES)
    _check_number("gate_threshold", options.gate_threshold, 0.0, "0 always zooms, above 1 never")
    _check_number("region_threshold", options.region_threshold, 0.0, "a heat-map value, or a share of the peak")
    for name in CROP_BOUNDS:
        _check_tokens(name, getattr(options, name))
    low, high = options.crop_min_tokens, options.crop_max_tokens
    if low is not None and high is not None and low > high:
        raise ValueError(f"crop_min_tokens ({low}) is larger than crop_max_tokens ({high}).")
    if options.position_alignment is not None:
        _check_choice("position_alignment", options.position_alignment, ALIGNMENTS)
        if options.position_alignment == "continuous" and not mrope:
            raise ValueError(
                "position_alignment='continuous' needs fractional (M-RoPE) positions, which this backbone does not "
                "have; leave the option out or pass 'sequential'."
            )


def check_presets(
    presets: dict[str, dict[str, Any]], defaults: ZoomOptions, *, mrope: bool
) -> dict[str, dict[str, Any]]:
    """Checks a checkpoint's presets, each together with the options that it leaves alone.

    Returns:
        The presets with Python numbers, which JSON can hold.

    Raises:
        ValueError: names the preset and what is wrong with it.
    """
    for name, preset in presets.items():
        if not isinstance(preset, dict):
            raise ValueError(f"preset {name!r} must be a dict of options, got {preset!r}.")
        unknown = sorted(set(preset) - set(OPTION_NAMES))
        if unknown:
            raise ValueError(f"preset {name!r} sets {unknown}; a preset may set {sorted(OPTION_NAMES)}.")
        values = {key: value for key, value in preset.items() if value is not None}
        try:
            validate_options(replace(defaults, **values), mrope=mrope)
        except ValueError as error:
            raise ValueError(f"preset {name!r}: {error}") from error
    return {name: {key: python_number(value) for key, value in preset.items()} for name, preset in presets.items()}


def find_preset(effort: Any, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options of a preset; none for `effort=None`.

    Raises:
        ValueError: the checkpoint has no such preset.
    """
    if effort is None:
        return {}
    if not isinstance(effort, str) or effort not in presets:
        known = sorted(presets) or "none; set thresholds and budgets one by one"
        raise ValueError(f"effort={effort!r} is not a preset of this checkpoint (presets: {known}).")
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
        _check_tokens(name, resolved[name])
    low, high = CROP_BOUNDS
    if resolved[low] > resolved[high] and ranks[low] != ranks[high]:
        strong, weak = sorted(CROP_BOUNDS, key=ranks.__getitem__)
        resolved[weak] = resolved[strong]


def resolve_options(
    call: dict[str, Any], generation_configs: Sequence[GenerationConfig], config: PreTrainedConfig, *, mrope: bool
) -> ZoomOptions:
    """Call > generation configs > model config.

    In the call and in a generation config, an explicit option wins over the `effort` preset beside it. The model
    config always holds a value for every option, so there the preset, where one is named, wins over the values.
    A bound of the crop's budget moves the opposite one of a weaker source out of its way.

    Args:
        call: options of the call by name (`effort` included), None where not given.
        generation_configs: those in force, the call's before the model's; their attributes may carry options.
        config: the model's `QZoomConfig`.

    Raises:
        ValueError: unknown preset, or what `validate_options` refuses.
    """
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
    return options
