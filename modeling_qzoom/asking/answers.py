"""Questions about images in batches: from (image, question) rows to answers with their zoom reports."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from .. import ZoomReport
from ..backbones_qzoom import token_grid_of
from ..prompt_qzoom import marker_ids
from .budgets import Budget
from .chats import encode_prompts, render
from .session import Session


ImageQuestion = tuple[Image.Image, str]
T = TypeVar("T")

BATCH_SIZE = 16


@dataclass(frozen=True)
class Answer:
    """What the model said about one row, and what the prompt looked like, which is what its cost depends on.

    Args:
        text: the decoded answer without special tokens and surrounding white space.
        report: what zooming did.
        prompt_tokens: number of tokens of the prompt without padding.
        suffix_tokens: number of tokens of the prompt after the image and its end marker.
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


def prepare(session: Session, rows: Sequence[ImageQuestion], budget: Budget | None = None) -> BatchFeature:
    """One batch of rows as `generate` takes it, on the model's device and in its type.

    Args:
        session: the model; its configuration sets the prompts.
        rows: an image and its question each.
        budget: coarse budget; the processor's own if None.
    """
    texts = [render(session.processor, [(question, None)], session.config) for _, question in rows]
    inputs = BatchFeature(encode_prompts(session.processor, [image for image, _ in rows], texts, budget))
    inputs = inputs.to(session.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(session.model.dtype)
    return inputs


def _suffix_tokens(ids: Tensor, image_token_id: int, markers: tuple[int, int] | None) -> int:
    """Tokens of a row (N,) behind its last image, the image's end marker not counted."""
    end = int((ids == image_token_id).nonzero()[-1, 0]) + 1
    if markers is not None and end < len(ids) and int(ids[end]) == markers[1]:
        end += 1
    return len(ids) - end


def answer_batch(session: Session, inputs: BatchFeature, **options: Any) -> list[Answer]:
    """Greedy answers to a prepared batch of rows with one image each.

    Args:
        session: the model; its configuration sets the longest answer.
        inputs: what `prepare` makes of the rows; it serves several calls.
        options: zoom options of `generate`; with zoom="never" the model is the plain one.
    """
    model, processor = session.model, session.processor
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=session.config.max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        return_zoom_reports=True,
        **options,
    )
    ids = inputs["input_ids"]
    texts = processor.batch_decode(output.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    lengths = inputs["attention_mask"].sum(1).tolist()
    image_tokens = int((ids == model.config.image_token_id).sum())
    grids = token_grid_of(model.config.vlm_config).token_grids(image_tokens, inputs.get("image_grid_thw"))
    markers, image_token = marker_ids(model.config), model.config.image_token_id
    suffixes = [_suffix_tokens(row, image_token, markers) for row in ids.cpu()]
    stripped = [text.strip() for text in texts]
    return [Answer(*parts) for parts in zip(stripped, output.zoom_reports, lengths, suffixes, grids, strict=True)]


def ask_batch(
    session: Session, rows: Sequence[ImageQuestion], *, budget: Budget | None = None, **options: Any
) -> list[Answer]:
    """Greedy answers to rows that fit into one batch; arguments as for `ask`."""
    return answer_batch(session, prepare(session, rows, budget), **options)


def in_batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` rows, the last one shorter; rows are drawn as they are needed."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def ask(
    session: Session,
    rows: Iterable[ImageQuestion],
    *,
    batch_size: int = BATCH_SIZE,
    budget: Budget | None = None,
    **options: Any,
) -> Iterator[Answer]:
    """Greedy answers to rows in order; no more than one batch of images is in memory.

    Args:
        session: the model; its configuration sets prompts and the longest answer.
        rows: an image and its question each; any iterable, a generator too. Several questions about one image
            repeat it.
        batch_size: rows that are answered together.
        budget: coarse budget (smallest, largest number of merged visual tokens); the processor's own if None.
        options: zoom options of `generate`; with zoom="never" the model is the plain one.
    """
    for batch in in_batches(rows, batch_size):
        yield from ask_batch(session, batch, budget=budget, **options)
