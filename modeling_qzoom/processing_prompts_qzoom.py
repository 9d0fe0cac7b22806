"""Prompts that no answer can follow, refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.processing_utils import ProcessorMixin

from .errors_qzoom import InputError


def refuse_touching_images(prompts: Sequence[str], processor: ProcessorMixin) -> None:
    """Refuses images without anything between them, which families with tokens around an image take for one.

    Args:
        prompts: rendered texts with one placeholder an image.
        processor: the backbone's processor, which knows the placeholders.

    Raises:
        InputError: names the row.
    """
    tokens = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    for row, prompt in enumerate(prompts):
        for token in filter(None, tokens):
            if token * 2 in prompt:
                raise InputError(
                    f"row {row} has two {token} without anything between them, so that they would count as one. Put "
                    f"the family's markers around each: <|vision_start|>{token}<|vision_end|>, as its chat template "
                    "does."
                )


def refuse_empty_rows(encoded: Mapping[str, Any]) -> None:
    """Refuses rows without a token.

    Args:
        encoded: what the backbone's processor returned.

    Raises:
        InputError: names the rows.
    """
    rows = encoded.get("attention_mask", encoded.get("input_ids"))
    if rows is None:
        return
    is_mask = "attention_mask" in encoded
    empty = [row for row, tokens in enumerate(rows) if not len(tokens) or is_mask and not np.asarray(tokens).any()]
    if empty:
        raise InputError(f"rows {empty}: the prompt is empty, it holds no token to go on from.")
