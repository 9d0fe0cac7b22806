"""Greedy answers of the model to questions about one image each, as the labelling stages and the judges need them."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor

from .. import ZoomReport
from .prompts import encode_prompts, render
from .session import Session


@overload
def greedy_answers(
    session: Session,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    min_tokens: int | None = ...,
    max_tokens: int | None = ...,
    reports: Literal[False] = ...,
    **options: Any,
) -> list[str]: ...


@overload
def greedy_answers(
    session: Session,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    min_tokens: int | None = ...,
    max_tokens: int | None = ...,
    reports: Literal[True],
    **options: Any,
) -> tuple[list[str], list[ZoomReport]]: ...


@torch.inference_mode()
def greedy_answers(
    session: Session,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    reports: bool = False,
    **options: Any,
) -> list[str] | tuple[list[str], list[ZoomReport]]:
    """Answers to one question per image, without special tokens and surrounding white space.

    Args:
        session: Its configuration sets prompts and the longest answer.
        images: One per question; several questions about one image repeat it.
        questions: As the user asks them.
        min_tokens, max_tokens: Coarse budget in merged visual tokens; the processor's own by default.
        reports: Also return what the model did, one `ZoomReport` per row.
        options: Zoom options of `generate`, such as `zoom="never"`.

    Returns:
        The answers, or answers and reports.
    """
    processor = session.processor
    texts = [render(processor, [(question, None)], session.config) for question in questions]
    inputs = encode_prompts(processor, images, texts, min_tokens, max_tokens)
    inputs = {name: value.to(session.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    output = session.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=session.config.max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        return_zoom_reports=True,
        **options,
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return (answers, output.zoom_reports) if reports else answers
