"""The zoom options of one call: their names, their validation and the order in which their sources win."""

import math
from dataclasses import dataclass, fields
from typing import Any


ZOOM_MODES = ("auto", "always", "never")
THRESHOLD_MODES = ("absolute", "peak")
ALIGNMENTS = ("continuous", "sequential")


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


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")


def _check_number(name: str, value: Any, low: float, meaning: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < low:
        raise ValueError(f"{name} must be a finite number ≥ {low:g} ({meaning}), got {value!r}.")


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
    for name in ("crop_min_tokens", "crop_max_tokens"):
        value = getattr(options, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive number of merged visual tokens or None, got {value!r}.")
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


def resolve_options(call: dict[str, Any], generation_config, config, *, mrope: bool) -> ZoomOptions:
    """Call > generation config > model config; at each of them an explicit option wins over the `effort` preset.

    Args:
        call: options of the call by name (`effort` included), None where not given.
        generation_config: the generation config in force, whose attributes may carry options.
        config: the model's `QZoomConfig`.

    Raises:
        ValueError: unknown preset, or what `validate_options` refuses.
    """
    resolved: dict[str, Any] = {}
    for source in (call, vars(generation_config) if generation_config is not None else {}, vars(config)):
        effort = source.get("effort")
        if effort is not None and effort not in config.presets:
            known = sorted(config.presets) or "none; set thresholds and budgets one by one"
            raise ValueError(f"effort={effort!r} is not a preset of this checkpoint (presets: {known}).")
        preset = config.presets[effort] if effort is not None else {}
        for name in OPTION_NAMES:
            value = source.get(name)
            value = preset.get(name) if value is None else value
            if value is not None:
                resolved.setdefault(name, value)
    options = ZoomOptions(**resolved)
    validate_options(options, mrope=mrope)
    return options
