"""Questions about images in batches: from (image, question) rows to answers with their zoom reports."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from .. import QZoomForConditionalGeneration, QZoomProcessor, ZoomReport
from ..backbones_qzoom import token_grid_of
from ..prompt_qzoom import marker_ids
from .budgets import Budget
from .chats import encode_prompts, render
from .session import Session


BATCH_SIZE = 16
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """What the model said about one row, and what the prompt looked like, which is what its cost depends on.

    Args:
        text: The decoded answer without special tokens.
        report: What zooming did.
        prompt_tokens: Tokens of the prompt without padding.
        suffix_tokens: Tokens of the prompt behind the image and its end marker.
        grid: (height, width) of the coarse image in merged visual tokens.
    """

    text: str
    report: ZoomReport
    prompt_tokens: int
    suffix_tokens: int
    grid: tuple[int, int]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that the decoder saw, the crop's included."""
        return self.report.coarse_tokens + self.report.crop_tokens


def prepare(
    model: QZoomForConditionalGeneration,
    processor: QZoomProcessor,
    rows: Sequence[tuple[Image.Image, str]],
    budget: Budget | None = None,
) -> BatchFeature:
    """One batch of (image, question) rows as `generate` takes it, on the model's device and in its type.

    Args:
        budget: Coarse budget; the processor's own if None.
    """
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for _, question in rows
    ]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    sizes: dict[str, Any] = {} if budget is None else {"min_tokens": budget[0], "max_tokens": budget[1]}
    inputs = processor(images=[[image] for image, _ in rows], text=prompts, **sizes).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def _suffix_tokens(ids: Tensor, image_token_id: int, markers: tuple[int, int] | None) -> int:
    """Tokens of a row (N,) behind its last image, the image's end marker not counted."""
    end = int((ids == image_token_id).nonzero()[-1, 0]) + 1
    if markers is not None and end < len(ids) and int(ids[end]) == markers[1]:
        end += 1
    return len(ids) - end


def answer_batch(
    model: QZoomForConditionalGeneration,
    processor: QZoomProcessor,
    inputs: BatchFeature,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options: Any,
) -> list[Answer]:
    """Greedy answers to a prepared batch of rows with one image each.

    Args:
        options: Zoom options of `generate`; with zoom="never" the model is the plain one.
    """
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_zoom_reports=True, **options
    )
    ids = inputs["input_ids"]
    texts = processor.batch_decode(output.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    lengths = inputs["attention_mask"].sum(1).tolist()
    image_tokens = int((ids == model.config.image_token_id).sum())
    grids = token_grid_of(model.config.vlm_config).token_grids(image_tokens, inputs.get("image_grid_thw"))
    markers, image_token = marker_ids(model.config), model.config.image_token_id
    suffixes = [_suffix_tokens(row, image_token, markers) for row in ids.cpu()]
    return [Answer(*parts) for parts in zip(texts, output.zoom_reports, lengths, suffixes, grids, strict=True)]


def in_batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` rows, the last one shorter; rows are drawn as they are needed."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def ask(
    model: QZoomForConditionalGeneration,
    processor: QZoomProcessor,
    rows: Iterable[tuple[Image.Image, str]],
    *,
    batch_size: int = BATCH_SIZE,
    budget: Budget | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options: Any,
) -> Iterator[Answer]:
    """Answers to (image, question) rows in order; no more than one batch of images is held.

    Args:
        rows: Any iterable, a generator too.
        budget: Coarse budget (smallest, largest number of merged visual tokens); the processor's own if None.
        options: Zoom options of `generate`; with zoom="never" the model is the plain one.
    """
    for batch in in_batches(rows, batch_size):
        inputs = prepare(model, processor, batch, budget)
        yield from answer_batch(model, processor, inputs, max_new_tokens, **options)


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
