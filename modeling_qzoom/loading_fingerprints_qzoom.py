"""Fingerprints of base models: an add-on records which base it was made for, and is not put on another one."""

import base64
import contextlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from .errors_qzoom import CheckpointError


# where an add-on's weights file keeps it: in the header's metadata, which other readers pass over
FINGERPRINT = "base_fingerprint"
_SAMPLED = 8
_VERSION = 1
# the same weight has these parts in its name or not, depending on who saved it
_OPTIONAL_PARTS = ("model", "language_model", "vision_model")
# sizes that have to agree, wherever a configuration has them
_SIZES = (
    "model_type",
    "num_hidden_layers",
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "vocab_size",
    "patch_size",
)
# a float16 copy flushes what is smaller to zero
_SMALLEST = 2.0**-24
_PRECISIONS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

_compares_weights: ContextVar[bool] = ContextVar("compares_weights", default=True)


@contextlib.contextmanager
def comparing_weights(compare: bool) -> Iterator[None]:
    """Sets, for the load within, whether an add-on's base has to have the weights that it was made for."""
    token = _compares_weights.set(compare)
    try:
        yield
    finally:
        _compares_weights.reset(token)


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _OPTIONAL_PARTS)


def _sample(weights: Any, key: str) -> Tensor | None:
    """A few values of a stored tensor, from its first row and the middle one, in float32; None for a scalar."""
    part = weights.get_slice(key)
    shape = part.get_shape()
    if not shape or 0 in shape:
        return None
    if len(shape) == 1:
        return part[:_SAMPLED].float()
    middle = shape[0] // 2
    rows = (part[0:1], part[middle : middle + 1])
    return torch.cat([row.flatten()[:_SAMPLED].float() for row in rows])


def _samples(files: list[str]) -> dict[str, Tensor]:
    samples = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                sample = _sample(weights, key)
                if sample is not None:
                    samples[_plain_name(key)] = sample
    return samples


def base_fingerprint(files: list[str]) -> str:
    """A few stored values of every tensor of a model, as text.

    Args:
        files: its safetensors files; only what is sampled is read.
    """
    values = {name: base64.b64encode(sample.numpy().tobytes()).decode() for name, sample in _samples(files).items()}
    return json.dumps({"version": _VERSION, "values": values})


def _precision(samples: list[Tensor]) -> torch.dtype:
    """The coarsest type that holds all values: that of the file, or of the file that it was copied from."""
    values = torch.cat(samples)
    for dtype in _PRECISIONS:
        if torch.equal(values.to(dtype).float(), values):
            return dtype
    return torch.float32


def differing_weights(fingerprint: str, files: list[str]) -> tuple[list[str], int]:
    """Compares a base with the one that a fingerprint is of; copies of it in another type are equal to it.

    Args:
        files: the base's safetensors files.

    Returns:
        Names of the tensors that differ, and the number of those that were compared.

    Raises:
        CheckpointError: the fingerprint is damaged.
    """
    try:
        content = json.loads(fingerprint)
        if content["version"] != _VERSION:  # of a later version, which compares in another way
            return [], 0
        values = content["values"].items()
        recorded = {
            name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) for name, text in values
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the add-on's record of its base model is damaged: {error!r}") from error
    given = _samples(files)
    # packed weights have other shapes than dense ones
    shared = [name for name in recorded if name in given and recorded[name].shape == given[name].shape]
    if not shared:
        return [], 0
    kinds = {_precision([samples[name] for name in shared]) for samples in (recorded, given)}
    relative = 0.0 if len(kinds) == 1 else max(_PRECISIONS.get(kind, 0.0) for kind in kinds)
    differing = [
        name
        for name in shared
        if not torch.allclose(given[name], recorded[name], rtol=relative, atol=_SMALLEST, equal_nan=True)
    ]
    return differing, len(shared)


def differing_sizes(made_for: PreTrainedConfig, base: PreTrainedConfig) -> list[str]:
    """Where two VLMs' configurations describe models of different shape, in words."""
    different = []
    pairs = {"": (made_for, base), "text_config.": (made_for.get_text_config(), base.get_text_config())}
    if hasattr(base, "vision_config"):
        pairs["vision_config."] = (made_for.vision_config, base.vision_config)
    for part, (expected, given) in pairs.items():
        for name in _SIZES:
            size, base_size = (getattr(config, name, None) for config in (expected, given))
            if size is not None and base_size is not None and size != base_size:
                different.append(f"{part}{name} {base_size!r} instead of {size!r}")
    return different


def check_base(base: str, config: PreTrainedConfig, vlm_config: PreTrainedConfig) -> None:
    """Compares the sizes of an add-on's base with those that the add-on was made for.

    Args:
        base: name of the base, for the message.
        config: configuration of the base.
        vlm_config: the VLM's configuration that the add-on holds.

    Raises:
        CheckpointError: they differ.
    """
    different = differing_sizes(vlm_config, config)
    if different:
        raise CheckpointError(
            f"this add-on was made for another model than {base!r}, which has {different[0]}. Name its own base: "
            "from_pretrained(…, base_model_name_or_path=…)."
        )


def check_base_weights(base: str, fingerprint: str | None, files: list[str]) -> None:
    """Compares the weights of an add-on's base with those that the add-on was made for.

    Args:
        base: name of the base, for the message.
        fingerprint: what the add-on recorded; None in one that is older than this check.
        files: the base's safetensors files.

    Raises:
        CheckpointError: they differ, and the call does not say that this is meant.
    """
    if fingerprint is None or not _compares_weights.get():
        return
    differing, count = differing_weights(fingerprint, files)
    if differing:
        raise CheckpointError(
            f"the weights of the base model {base!r} are not those that this add-on was made for: {len(differing)} of "
            f"{count} tensors differ, e.g. {differing[0]}. Name its own base: from_pretrained(…, "
            "base_model_name_or_path=…); or, if another training of that model is meant, pass check_base=False."
        )
