"""Where a model looks while it answers: response-to-image attention of chosen heads (paper III-C2, eq. 10).

The response is the model's own. One more pass over prompt and response stops at the highest chosen layer and keeps its
usual attention implementation; beside it, only the chosen heads' weights at the response's tokens are computed.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from ... import QZoomForConditionalGeneration
from ...asking.chats import stack_features
from ...asking.session import Session
from ...backbone_layers_qzoom import Rotary, run_layers
from ...prompt_qzoom import prompt_images
from ...zoom_coarse_qzoom import CoarseView, coarse_view
from .config import Heads


QUERY_TOKENS = ("response", "before")


@dataclass(frozen=True)
class Response:
    """What the model answered to one prompt.

    Args:
        ids: (n,) generated tokens up to the end-of-sequence token, which is not among them.
        ended: Whether it ended by itself; otherwise the longest allowed answer was reached.
    """

    ids: Tensor
    ended: bool


@torch.no_grad()
def respond(model: QZoomForConditionalGeneration, inputs: dict[str, Any], max_new_tokens: int) -> list[Response]:
    """Greedy responses of the plain VLM, without zooming.

    Args:
        inputs: A batch of the processor, padded on the left, on the model's device.
        max_new_tokens: Longest response.
    """
    visual = [model.config.image_token_id, model.config.video_token_id]
    output = model.generate(
        **inputs,
        zoom="never",
        do_sample=False,
        max_new_tokens=max_new_tokens,
        # the pass over the response would look for an image behind such a token
        suppress_tokens=[token for token in visual if token is not None],
    )
    new = output[:, inputs["input_ids"].shape[1] :]  # (B, n)
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    ends = torch.isin(new, torch.tensor(stops, device=new.device, dtype=new.dtype))
    lengths = torch.where(ends.any(1), ends.int().argmax(1), new.shape[1]).tolist()
    return [
        Response(ids[:length], ended) for ids, length, ended in zip(new, lengths, ends.any(1).tolist(), strict=True)
    ]


def all_heads(model: QZoomForConditionalGeneration) -> Heads:
    """Every head of every decoder layer below the last."""
    config = model.config.get_text_config()
    return {layer: list(range(config.num_attention_heads)) for layer in range(config.num_hidden_layers - 1)}


def count_heads(heads: Heads) -> int:
    """Number of heads in a table."""
    return sum(len(chosen) for chosen in heads.values())


def check_heads(model: QZoomForConditionalGeneration, heads: Heads) -> None:
    """Raises:
    ValueError: The model has no such layer or head.
    """
    config = model.config.get_text_config()
    layers, count = config.num_hidden_layers, config.num_attention_heads
    for layer, chosen in heads.items():
        if not 0 <= layer < layers:
            raise ValueError(f"The heads name layer {layer}; the model has layers 0 to {layers - 1}.")
        wrong = [head for head in chosen if not 0 <= head < count]
        if wrong:
            raise ValueError(f"The heads name {wrong} in layer {layer}; the model has heads 0 to {count - 1}.")


def _queries(start: int, responses: Sequence[Response], query_tokens: str) -> tuple[Tensor, Tensor]:
    """(B, Q) columns of the asking tokens, and (B, Q) which of them count.

    Args:
        start: Column of the first response token.
    """
    if query_tokens not in QUERY_TOKENS:
        raise ValueError(f"query_tokens must be one of {list(QUERY_TOKENS)}, got {query_tokens!r}.")
    if query_tokens == "before":
        counts = [len(response.ids) for response in responses]
        start -= 1
    else:
        # what was cut off is not fed back while generating, so its last token never looked at anything
        counts = [len(response.ids) - (not response.ended) for response in responses]
    offsets = torch.arange(max(1, *counts))
    keep = offsets < torch.tensor(counts)[:, None]
    return (start + offsets).expand(len(counts), -1) * keep, keep


def _append(inputs: dict[str, Any], responses: Sequence[Response]) -> dict[str, Any]:
    """The prompts with their responses, which are padded on the right."""
    prompt = inputs["input_ids"]
    tail = nn.utils.rnn.pad_sequence([response.ids for response in responses], batch_first=True)  # (B, n)
    valid = nn.utils.rnn.pad_sequence([torch.ones_like(response.ids) for response in responses], batch_first=True)
    joined = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == prompt.shape:
            part = {"input_ids": tail, "attention_mask": valid}.get(name, torch.zeros_like(tail))
            joined[name] = torch.cat([value, part.to(value)], dim=1)
    return joined


def _project(states: Tensor, projection: nn.Module, norm: nn.Module | None, width: int, rotary: Rotary) -> Tensor:
    """Rotated heads (B, n, heads, width) of normed hidden states (B, n, D); `rotary` as for the decoder's layers."""
    heads = projection(states).unflatten(-1, (-1, width))
    heads = heads if norm is None else norm(heads)
    cos, sin = (part.to(heads.device, heads.dtype).unsqueeze(2) for part in rotary)
    return heads * cos + rotate_half(heads) * sin


def _attention(
    layer: Any, hidden: Tensor, view: CoarseView, columns: Tensor, keep: Tensor, heads: list[int]
) -> Tensor:
    """(B, heads, n) attention of a layer's heads to all tokens, averaged over the asking tokens; float32.

    Args:
        hidden: (B, n, D), what the layer receives.
        columns, keep: From `_queries`.
    """
    attention, device = layer.self_attn, hidden.device
    columns, keep = columns.to(device), keep.to(device)
    rows = torch.arange(len(hidden), device=device)[:, None]
    cos, sin = (part.to(device) for part in view.position_embeddings)
    normed = layer.input_layernorm(hidden)
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    width = attention.head_dim
    asked = cos[rows, columns], sin[rows, columns]
    queries = _project(normed[rows, columns], attention.q_proj, query_norm, width, asked)  # (B, Q, H, d)
    keys = _project(normed, attention.k_proj, key_norm, width, (cos, sin))  # (B, n, Hkv, d)
    group = queries.shape[2] // keys.shape[2]
    queries = queries[:, :, heads].float()
    keys = keys[:, :, [head // group for head in heads]].float()
    scores = torch.einsum("bqhd,bnhd->bhqn", queries, keys) * attention.scaling
    visible = torch.arange(hidden.shape[1], device=device) <= columns[..., None]  # (B, Q, n)
    visible = visible & (view.valid.to(device)[:, None] > 0)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~keep[:, None, :, None], 0)  # also the queries of padding, which see nothing
    return weights.sum(2) / keep.sum(1).clamp(min=1)[:, None, None]


@torch.no_grad()
def response_maps(
    model: QZoomForConditionalGeneration,
    inputs: dict[str, Any],
    responses: Sequence[Response],
    heads: Heads | None = None,
    query_tokens: str = "response",
) -> list[Tensor | None]:
    """Response-to-image attention, averaged over response tokens.

    Args:
        inputs: The prompts, one image each, as they were given to `respond`.
        responses: What it returned.
        heads: Heads by layer; all below the last layer by default.
        query_tokens: "response": the response's tokens ask (without the end-of-sequence token; the last token of a
            response that was cut off does not); "before": the tokens in front of each of them, which predict it.

    Returns:
        Per row a float32 map (heads, h, w) on the CPU, heads by ascending layer and within it in the table's order;
        None for a row without a token that asks.

    Raises:
        ValueError: A row has not exactly one image, or the model lacks a head.
    """
    heads = all_heads(model) if heads is None else heads
    check_heads(model, heads)
    columns, keep = _queries(inputs["input_ids"].shape[1], responses, query_tokens)
    whole = _append(inputs, responses)
    ids = whole["input_ids"]
    spans = prompt_images(model.config, ids, whole.get("image_grid_thw"))
    if any(len(row) != 1 for row in spans):
        raise ValueError(f"Every row needs exactly one image; the rows have {[len(row) for row in spans]}.")
    view = coarse_view(model, ids, whole.get("attention_mask"), whole)
    decoder = model.vlm.get_decoder()
    hidden, reached = view.embeds, 0
    found: list[list[Tensor]] = [[] for _ in spans]
    for layer in sorted(layer for layer in heads if heads[layer]):
        hidden = run_layers(
            decoder,
            hidden,
            reached,
            layer,
            mask=view.mask,
            position_embeddings=view.position_embeddings,
            deepstack=view.deepstack,
        )
        reached = layer
        weights = _attention(decoder.layers[layer], hidden, view, columns, keep, heads[layer]).cpu()  # (B, heads, n)
        for row, (span,) in enumerate(spans):
            found[row].append(weights[row, :, span.start : span.end].unflatten(1, span.grid))
    return [torch.cat(maps) if asks else None for maps, asks in zip(found, keep.any(1).tolist(), strict=True)]


def share_images(
    model: QZoomForConditionalGeneration, features: Sequence[dict[str, Any]], images: Sequence[Hashable], pad: int
) -> dict[str, Any]:
    """One batch of rows, each distinct image of which goes through the vision tower once, for all passes over it.

    Args:
        features: Processor outputs of one row each.
        images: What tells which rows show the same image at the same budget.
        pad: Token id of the padding.

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

    Args:
        response: Its answer without special tokens.
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
        session: Its configuration sets the longest answer.
        features, images: As for `share_images`.
        heads, query_tokens: As for `response_maps`.
    """
    tokenizer = session.processor.tokenizer
    inputs = share_images(session.model, features, images, tokenizer.pad_token_id)
    responses = respond(session.model, inputs, session.config.max_new_tokens)
    maps = response_maps(session.model, inputs, responses, heads, query_tokens)
    texts = [tokenizer.decode(response.ids, skip_special_tokens=True).strip() for response in responses]
    return [Look(text, attention) for text, attention in zip(texts, maps, strict=True)]
