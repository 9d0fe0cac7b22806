"""Checks of a prompt's tensors against each other, before any layer runs: each cause has its own sentence."""

import math
from typing import Any

import torch
from torch import Tensor

from .backbone_grids_qzoom import FixedGrid, TokenGrid
from .backbones_qzoom import token_grid_of
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import InputError
from .messages_qzoom import described
from .prompt_qzoom import ImageSpan, prompt_images


_FROM_PROCESSOR = "Pass what QZoomProcessor returned, unchanged."


def _is_integer(value: Any) -> bool:
    is_number = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    return is_number and value.dtype != torch.bool


def check_ids(input_ids: Any, vocabulary_size: int | None) -> None:
    """Checks the ids of a call, whatever it does with them.

    Args:
        vocabulary_size: number of embeddings; None where it is not known.

    Raises:
        InputError: no integer tensor (B, N), an empty prompt, or an id without an embedding.
    """
    if not _is_integer(input_ids) or input_ids.ndim != 2:
        way_out = "; a single prompt needs a first dimension of 1" if getattr(input_ids, "ndim", 0) == 1 else ""
        raise InputError(
            f"input_ids must be a tensor of whole numbers (batch, tokens), got {described(input_ids)}{way_out}. "
            "A processor makes one with return_tensors='pt'."
        )
    if not input_ids.numel():
        raise InputError(
            f"the prompt is empty: input_ids has the shape {tuple(input_ids.shape)}. Give at least one row with at "
            "least one token."
        )
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or (vocabulary_size is not None and high >= vocabulary_size):
        known = "" if vocabulary_size is None else f" (the model has embeddings for 0 to {vocabulary_size - 1})"
        raise InputError(
            f"input_ids holds {low if low < 0 else high}, which is no token of this model{known}. Were the ids made "
            "with this model's tokenizer, and -100 kept for labels?"
        )


def check_mask(attention_mask: Any, batch: int, lengths: tuple[int, ...]) -> None:
    """Checks the padding mask of a call.

    Args:
        attention_mask: None where nothing is padded.
        batch: number of rows.
        lengths: the numbers of columns that will do.

    Raises:
        InputError: not a (batch, length) tensor of ones and zeros.
    """
    if attention_mask is None:
        return
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else None
    if shape not in [(batch, length) for length in lengths]:
        raise InputError(
            f"attention_mask must be a tensor (batch, tokens) like input_ids, here ({batch}, {lengths[-1]}), got "
            f"{described(attention_mask)}. {_FROM_PROCESSOR}"
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise InputError(
            "attention_mask must hold ones and zeros (1: a token, 0: padding), other numbers were given. "
            + _FROM_PROCESSOR
        )


def _check_grids(name: str, grids: Any, merge: int, *, frames: bool) -> None:
    """Grids (n, 3) of whole patches t, h, w that the family's tokens divide."""
    if not _is_integer(grids) or grids.ndim != 2 or grids.shape[1] != 3:
        raise InputError(
            f"{name} must be a tensor of whole numbers (images, 3) with t, h and w in patches, got "
            f"{described(grids)}. {_FROM_PROCESSOR}"
        )
    for index, (time, height, width) in enumerate(grids.tolist()):
        grid = f"{name}: grid {index} is {time, height, width} in patches"
        if min(time, height, width) < 1 or height % merge or width % merge:
            raise InputError(f"{grid}; h and w must be positive multiples of {merge}. {_FROM_PROCESSOR}")
        if time != 1 and not frames:
            raise InputError(f"{grid}; an image has one frame, t = 1. Pass videos as pixel_values_videos.")


def _check_patches(name: str, pixels: Any, grids: Tensor, grid: TokenGrid) -> None:
    width, count = 3 * grid.temporal_patch * grid.patch**2, int(grids.prod(1).sum())
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else None
    if shape != (count, width):
        raise InputError(
            f"{name} must be a tensor ({count}, {width}), a row for every patch of the grids, got "
            f"{described(pixels)}. {_FROM_PROCESSOR}"
        )


def _check_finite(name: str, pixels: Tensor) -> None:
    if pixels.is_floating_point() and not pixels.isfinite().all():
        raise InputError(
            f"{name} holds NaN or infinite values, which nothing can be seen in. Check the image, and how it was "
            "normalised."
        )


def _check_encoded(encoded: Any) -> None:
    """`mm_encoder_outputs`: what transformers makes of pixels, by kind."""
    outputs = list(encoded.values()) if isinstance(encoded, dict) else [encoded]
    wrong = [output for output in outputs if output is not None and not hasattr(output, "pooler_output")]
    if wrong:
        raise InputError(
            "mm_encoder_outputs must be a dict with what get_image_features and get_video_features return, under "
            f"'image' and 'video'; got {described(wrong[0])}."
        )


def _check_images(vision: dict[str, Any], count: int, grid: TokenGrid) -> None:
    """The pixels of a batch's images."""
    pixels, grids = vision.get("pixel_values"), vision.get("image_grid_thw")
    if pixels is None:
        if count and vision.get("mm_encoder_outputs") is None:
            raise InputError(
                "the prompt holds image tokens but pixel_values is missing; pass what the processor returned."
            )
        return
    if isinstance(grid, FixedGrid):
        expected = (count, 3, grid.side, grid.side)
        if not isinstance(pixels, Tensor) or tuple(pixels.shape) != expected:
            raise InputError(
                f"pixel_values must be a tensor {expected}, an image for every {math.prod(grid.token_grid)} image "
                f"tokens of the prompts, got {described(pixels)}. {_FROM_PROCESSOR}"
            )
    elif grids is not None:
        _check_patches("pixel_values", pixels, grids, grid)
    elif count == 0:
        raise InputError(f"pixel_values was given without image_grid_thw. {_FROM_PROCESSOR}")
    _check_finite("pixel_values", pixels)


def _check_videos(config: QZoomConfig, input_ids: Tensor, vision: dict[str, Any], grid: TokenGrid) -> None:
    """The pixels of a batch's videos."""
    pixels, grids = vision.get("pixel_values_videos"), vision.get("video_grid_thw")
    if config.video_token_id is None or pixels is None:
        return
    if grids is None:
        raise InputError(f"pixel_values_videos was given without video_grid_thw. {_FROM_PROCESSOR}")
    _check_grids("video_grid_thw", grids, grid.merge, frames=True)
    _check_patches("pixel_values_videos", pixels, grids, grid)
    _check_finite("pixel_values_videos", pixels)
    tokens, needed = int((input_ids == config.video_token_id).sum()), int(grids.prod(1).sum()) // grid.merge**2
    if tokens != needed:
        raise InputError(f"the prompts hold {tokens} video tokens, the given videos make {needed}. {_FROM_PROCESSOR}")


def _check_token_types(config: QZoomConfig, input_ids: Tensor, types: Any) -> None:
    if types is None:
        return
    images = input_ids == config.image_token_id
    fits = isinstance(types, Tensor) and types.shape == input_ids.shape
    if not fits or not torch.equal(types.to(images.device) == 1, images):
        raise InputError(
            "mm_token_type_ids must be 1 exactly where input_ids holds an image token; it does not. " + _FROM_PROCESSOR
        )


def _check_visible(
    config: QZoomConfig, input_ids: Tensor, valid: Tensor, spans: list[list[ImageSpan]], *, mrope: bool
) -> None:
    """What a mask with holes may hide: text, and where positions are one-dimensional also parts of an image."""
    for row, images in enumerate(spans):
        for image, span in enumerate(images):
            hidden = int((valid[row, span.start : span.end] == 0).sum())
            if hidden and (mrope or hidden == span.end - span.start):
                raise InputError(
                    f"row {row}, image {image}: the attention mask hides {hidden} of its {span.end - span.start} "
                    "tokens, but an image can only be seen whole. Leave the image out, or all of its tokens visible."
                )
            after = images[image + 1].start if image + 1 < len(images) else None
            if mrope and after is not None and not valid[row, span.end : after].any():
                raise InputError(
                    f"row {row}: no visible token stands between images {image} and {image + 1}, so that they look "
                    "like one. Put the markers around each image, as the chat template does."
                )
    if mrope and config.video_token_id is not None:
        rows = ((input_ids == config.video_token_id) & (valid == 0)).any(1).nonzero()[:, 0].tolist()
        if rows:
            raise InputError(
                f"rows {rows}: the attention mask hides tokens of a video, but a video can only be seen whole."
            )


def check_prompt(
    config: QZoomConfig, input_ids: Tensor, attention_mask: Tensor | None, vision: dict[str, Any]
) -> list[list[ImageSpan]]:
    """Checks mask, pixels and grids of a batch that may zoom against its ids.

    Args:
        input_ids, attention_mask: (B, N); the ids have passed `check_ids`.
        vision: the VLM's visual inputs by name.

    Returns:
        Where each row's images are.

    Raises:
        InputError: names the input and the cause.
    """
    mrope, grid = config.backbone.mrope, token_grid_of(config.vlm_config)
    check_mask(attention_mask, len(input_ids), (input_ids.shape[1],))
    grids = vision.get("image_grid_thw")
    if grids is not None:
        if isinstance(grid, FixedGrid):
            raise InputError("image_grid_thw does not apply: images of this backbone always have one token grid.")
        _check_grids("image_grid_thw", grids, grid.merge, frames=False)
    _check_encoded(vision.get("mm_encoder_outputs") or {})
    spans = prompt_images(config, input_ids, grids)
    _check_images(vision, sum(len(images) for images in spans), grid)
    _check_videos(config, input_ids, vision, grid)
    if mrope:
        _check_token_types(config, input_ids, vision.get("mm_token_type_ids"))
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check_visible(config, input_ids, valid.to(input_ids.device), spans, mrope=mrope)
    return spans
