"""A session: what whoever asks a model opens first, and how it is saved."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from .. import QZoomConfig, QZoomForConditionalGeneration, QZoomProcessor
from ..data.files import damage_named
from .config import ModelConfig


logger = logging.getLogger(__name__)


@dataclass
class Session:
    """A loaded model with its processor and the options that prompts and answers follow.

    Args:
        model: the model in evaluation mode, on this process's device.
        processor: its processor at the coarse budget in force.
        config: options of the model; a stage's own configuration is one.
    """

    model: QZoomForConditionalGeneration
    processor: QZoomProcessor
    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """Device of the embedding table, where prompts go."""
        return next(self.model.get_input_embeddings().parameters()).device


def _budget(config: ModelConfig, defaults: QZoomConfig | None) -> dict[str, int]:
    """The bounds of the coarse budget that the options or else the checkpoint set."""
    bounds = {}
    for name in ("min_tokens", "max_tokens"):
        value = getattr(config, name) or getattr(defaults, name, None)
        if value is not None:
            bounds[name] = value
    return bounds


def open_session(config: ModelConfig, device: str | torch.device | None = None) -> Session:
    """Load a Q-Zoom checkpoint, or a plain VLM with fresh branches, and its processor.

    Args:
        config: options of the model.
        device: where it goes: the process's own accelerator by default, the CPU where there is none.

    Raises:
        ValueError: there is no such model, no row for its backbone, or K lies beyond its last layer.
    """
    if device is None:
        from accelerate import PartialState

        device = PartialState().device
    source: dict[str, Any] = {} if config.revision is None else {"revision": config.revision}
    with damage_named(config.model):
        checkpoint = AutoConfig.from_pretrained(config.model, **source)
    arguments: dict[str, Any] = {"dtype": config.dtype, **source}
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        arguments["device_map"] = {"": device}
    if isinstance(checkpoint, QZoomConfig):
        with damage_named(config.model):
            model = QZoomForConditionalGeneration.from_pretrained(config.model, **arguments)
            processor = QZoomProcessor.from_pretrained(config.model, **source)
    else:
        if config.branch_layer is None:
            raise ValueError(
                f"model={config.model} is a plain VLM: say with branch_layer=K where its branches are to read."
            )
        with damage_named(config.model):
            model = QZoomForConditionalGeneration.from_backbone(
                config.model,
                branch_layer=config.branch_layer,
                branch_depth=config.branch_depth,
                zoom_config=_budget(config, None),
                **arguments,
            )
            processor = QZoomProcessor.from_backbone(config.model, **source)
    budget = _budget(config, model.config)
    for name, value in budget.items():
        setattr(processor, name, value)
        setattr(model.config, name, value)
    model.config.check_fields()
    if not config.load_in_4bit:
        model = model.to(device)
    return Session(model.eval(), processor, config)


def check_output_format(output_format: str) -> None:
    """Check how a checkpoint is to be written.

    Raises:
        ValueError: there is no such format.
    """
    if output_format not in ("full", "addon"):
        raise ValueError(f"output_format must be 'full' or 'addon', got {output_format!r}.")


def save_session(session: Session, folder: str | Path, output_format: str = "full") -> None:
    """Write model and processor as a checkpoint folder.

    Args:
        session: the model.
        folder: folder to write to.
        output_format: "full" or "addon".

    Raises:
        ValueError: an unknown format.
    """
    check_output_format(output_format)
    if output_format == "full":
        session.model.save_pretrained(folder)
    else:
        session.model.save_addon(folder)
    session.processor.save_pretrained(folder)
    logger.info("wrote %s", folder)
