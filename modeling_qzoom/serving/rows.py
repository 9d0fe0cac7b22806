"""A prompt as the model takes it, prepared alone, so that bad input is its sender's alone; and rows of one batch."""

import base64
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from .. import ZoomReport
from ..asking.chats import stack_features
from ..asking.session import Session
from ..backbone_grids_qzoom import FixedGrid
from ..backbones_qzoom import token_grid_of
from ..errors_qzoom import InputError
from ..messages_qzoom import one_line
from ..source_images_qzoom import SourceImages
from ..zoom_options_qzoom import ZoomOptions, resolve_options
from .config import ServeConfig
from .events import Prompt
from .sampling import Draw, draws_of


@dataclass(frozen=True)
class Row:
    """One prompt, ready to run.

    Attributes:
        features: what the processor made of it, for one row.
        options: zoom options in force.
        draws: how the words of each answer are chosen.
        prompt_tokens: length of the prompt in tokens.
        max_new_tokens: longest answer.
        overlay: whether its report comes with a picture.
    """

    features: dict[str, Any]
    options: ZoomOptions
    draws: list[Draw]
    prompt_tokens: int
    max_new_tokens: int
    overlay: bool

    @cached_property
    def bytes(self) -> int:
        """Memory of the features."""
        values = [*self.features.values(), *self.features.get("source_images", [])]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    @property
    def key(self) -> tuple[ZoomOptions, int]:
        """What rows of one batch have in common: the options of the call, and how often it repeats its rows."""
        return self.options, len(self.draws)

    def describe(self, report: ZoomReport) -> dict[str, Any]:
        """A report as JSON, with the options that led to it and, where asked for, the picture of it."""
        described = {**report.to_dict(), "options": asdict(self.options)}
        if self.overlay and "source_images" in self.features:
            picture = BytesIO()
            report.overlay(self.features["source_images"][report.image_index or 0]).save(picture, "PNG")
            described["overlay"] = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
        return described


def _check_pixels(images: list[bytes], most: int) -> None:
    """Checks the size of a chat's images together by their headers, before any is unpacked.

    Raises:
        InputError: they have too many pixels.
    """
    pixels = 0
    for image in images:
        with suppress(Exception), Image.open(BytesIO(image)) as opened:  # what cannot be read is named later
            pixels += opened.width * opened.height
    if pixels > most:
        raise InputError(
            f"the images of this chat have {pixels} pixels together, more than this server grants ({most}). Downscale "
            "them, or send fewer."
        )


def _encode(session: Session, prompt: Prompt, most_pixels: int) -> dict[str, Any]:
    """The processor's features of one prompt.

    Raises:
        InputError: an image that cannot be used, or a chat that the template refuses.
    """
    images = [part["image"] for message in prompt.messages for part in message["content"] if part["type"] == "image"]
    _check_pixels(images, most_pixels)
    shown = [
        {
            "role": message["role"],
            "content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]],
        }
        for message in prompt.messages
    ]
    try:
        text = session.processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise InputError(f"the chat template of this model refuses the messages: {one_line(error)}") from None
    low, high = prompt.budget.get("min_tokens"), prompt.budget.get("max_tokens")
    return dict(session.processor(images=[images] if images else None, text=[text], min_tokens=low, max_tokens=high))


def _largest_crop(session: Session, prompt: Prompt, options: ZoomOptions) -> int:
    """Most tokens that a crop may have; without a budget of its own it has that of the coarse view."""
    grid = token_grid_of(session.model.config.vlm_config)
    if isinstance(grid, FixedGrid):
        return math.prod(grid.token_grid)
    return options.crop_max_tokens or prompt.budget.get("max_tokens") or session.processor.max_tokens or 0


def _room(session: Session, config: ServeConfig, prompt: Prompt, length: int, crop: int) -> int:
    """How many tokens an answer may have.

    Args:
        length: tokens of the prompt.
        crop: most tokens of its crop.

    Raises:
        InputError: prompt, crop and answer together are longer than the decoder's sequences.
    """
    limit = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
    wanted = prompt.max_new_tokens
    if limit is None:
        return wanted or config.max_new_tokens
    room = limit - length - crop
    if room < (wanted or 1):
        raise InputError(
            f"the prompt has {length} tokens, a crop may have {crop}, and the answer {wanted or 1} or "
            f"more; this model's sequences hold {limit}. Shorten the chat, show fewer or smaller images "
            "(zoom.max_tokens, zoom.crop_max_tokens), or lower max_tokens."
        )
    return wanted or min(config.max_new_tokens, room)


def prepare_row(session: Session, config: ServeConfig, prompt: Prompt) -> Row:
    """Makes a row of a prompt.

    Args:
        session: the model.
        config: limits.
        prompt: the request.

    Raises:
        InputError: options out of range, an image that cannot be used, or a prompt that is too long.
    """
    model = session.model
    defaults = model.generation_config
    options = resolve_options(prompt.zoom, [defaults], model.config, mrope=model.config.backbone.mrope)
    features = _encode(session, prompt, config.max_pixels)
    length = features["input_ids"].shape[1]
    zooms = options.zoom != "never" and "source_images" in features
    crop = _largest_crop(session, prompt, options) if zooms else 0
    return Row(
        features=features,
        options=options,
        draws=draws_of(prompt.sampling, defaults, prompt.choices),
        prompt_tokens=length,
        max_new_tokens=_room(session, config, prompt, length, crop),
        overlay=prompt.overlay,
    )


def join_rows(session: Session, rows: list[Row]) -> dict[str, Any]:
    """The rows of one batch as `generate` takes them, on the model's device and in its type."""
    inputs = stack_features([row.features for row in rows], session.processor.tokenizer.pad_token_id)
    if "source_images" in inputs:
        inputs["source_images"] = SourceImages(inputs["source_images"])
    inputs = {name: value.to(session.device) for name, value in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(session.model.dtype)
    return inputs
