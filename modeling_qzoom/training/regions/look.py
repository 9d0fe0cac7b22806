"""The model answers rows in one batch, and its attention is read meanwhile."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import QZoomForConditionalGeneration
from ...asking.chats import stack_features
from ...asking.session import Session
from .attention import response_maps
from .config import Heads
from .responses import respond


def share_images(
    model: QZoomForConditionalGeneration, features: Sequence[dict[str, Any]], images: Sequence[Hashable], pad: int
) -> dict[str, Any]:
    """One batch of rows, each distinct image of which goes through the vision tower once, for all passes over it.

    Args:
        features: processor outputs of one row each.
        images: what tells which rows show the same image at the same budget.
        pad: token id of the padding.

    Returns:
        Inputs of the model on its device, with `mm_encoder_outputs` in place of pixel values.
    """
    device = next(model.get_input_embeddings().parameters()).device
    first: dict[Hashable, dict[str, Any]] = {}
    for image, feature in zip(images, features, strict=True):
        first.setdefault(image, feature)
    names = [name for name in ("pixel_values", "image_grid_thw") if name in features[0]]
    vision = {name: torch.cat([feature[name] for feature in first.values()]).to(device) for name in names}
    encoded = model.vlm.get_image_features(**vision, return_dict=True)
    places = [list(first).index(image) for image in images]
    encoded.pooler_output = [encoded.pooler_output[place] for place in places]
    if getattr(encoded, "deepstack_features", None):
        encoded.deepstack_features = [[level[place] for place in places] for level in encoded.deepstack_features]
    left_out = ("pixel_values", "source_images", "source_boxes")
    batch = stack_features([{k: v for k, v in part.items() if k not in left_out} for part in features], pad)
    return {**{name: value.to(device) for name, value in batch.items()}, "mm_encoder_outputs": {"image": encoded}}


@dataclass(frozen=True)
class Look:
    """What the model answered and where it looked.

    Attributes:
        response: its answer without special tokens.
        attention: (heads, h, w), from `response_maps`; None where the answer is empty.
    """

    response: str
    attention: Tensor | None


@torch.no_grad()
def look(
    session: Session,
    features: Sequence[dict[str, Any]],
    images: Sequence[Hashable],
    heads: Heads | None = None,
    query_tokens: str = "response",
) -> list[Look]:
    """Let the model answer rows in one batch, and read its attention.

    Args:
        session: model whose configuration sets the longest answer.
        features: as for `share_images`.
        images: as for `share_images`.
        heads: as for `response_maps`.
        query_tokens: as for `response_maps`.
    """
    tokenizer = session.processor.tokenizer
    inputs = share_images(session.model, features, images, tokenizer.pad_token_id)
    responses = respond(session.model, inputs, session.config.max_new_tokens)
    maps = response_maps(session.model, inputs, responses, heads, query_tokens)
    texts = [tokenizer.decode(response.ids, skip_special_tokens=True).strip() for response in responses]
    return [Look(text, attention) for text, attention in zip(texts, maps, strict=True)]
