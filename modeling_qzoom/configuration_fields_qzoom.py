"""Fields of a configuration that come in several forms: the VLM's own configuration, image statistics, JSON."""

import json
import math
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .backbones_qzoom import spec_for_model_type
from .errors_qzoom import CheckpointError
from .messages_qzoom import one_line
from .zoom_options_qzoom import python_number


def as_vlm_config(value: Any) -> PreTrainedConfig:
    """The wrapped VLM's configuration, from any form that it may have.

    Raises:
        CheckpointError: it is none.
        UnsupportedError: the VLM's family is unknown.
    """
    if value is None:
        value = {"model_type": "qwen2_5_vl"}
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict):
        raise CheckpointError(f"vlm_config must be a dict or a configuration of transformers, got {value!r}.")
    fields = dict(value)
    model_type = fields.pop("model_type", "qwen2_5_vl")
    if not isinstance(model_type, str):
        raise CheckpointError(f"vlm_config: model_type must be a name, got {model_type!r}.")
    spec_for_model_type(model_type)  # its error is the clearer one
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # transformers checks fields with classes of errors of its own
        raise CheckpointError(f"vlm_config is no {model_type!r} configuration: {one_line(error)}") from error


def checked_statistics(name: str, value: Any) -> list[float]:
    """`image_mean` or `image_std` as three Python numbers."""
    try:
        numbers = [python_number(number) for number in value]
    except TypeError:
        numbers = []
    usable = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
    if len(numbers) != 3 or not usable or not all(math.isfinite(number) for number in numbers):
        raise CheckpointError(f"{name} must be three finite numbers, one a colour channel, got {value!r}.")
    if name == "image_std" and min(numbers) <= 0:
        raise CheckpointError(f"image_std must be above 0, since pixel values are divided by it, got {value!r}.")
    return numbers


def as_json(value: Any) -> Any:
    content = value.to_dict() if isinstance(value, PreTrainedConfig) else value
    return json.loads(json.dumps(content, default=str))
