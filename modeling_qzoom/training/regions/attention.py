"""Where a model looks while it answers: response-to-image attention of some heads (paper III-C2, eq. 10).

The response is the model's own. One more pass over prompt and response stops at the highest layer of these heads and
keeps its usual attention implementation; beside it, only the heads' weights at the response's tokens are computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import QZoomForConditionalGeneration
from ...backbone_layers_qzoom import run_layers
from ...backbone_projections_qzoom import project_heads
from ...prompt_qzoom import prompt_images
from ...zoom_coarse_qzoom import CoarseView, coarse_view
from .config import Heads, check_query_tokens
from .heads import all_heads, check_heads
from .responses import Response


def _queries(start: int, responses: Sequence[Response], query_tokens: str) -> tuple[Tensor, Tensor]:
    """(B, Q) columns of the asking tokens, and (B, Q) which of them count.

    Args:
        start: column of the first response token.
    """
    check_query_tokens(query_tokens)
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


def _attention(
    layer: Any, hidden: Tensor, view: CoarseView, columns: Tensor, keep: Tensor, heads: list[int]
) -> Tensor:
    """(B, heads, n) attention of a layer's heads to all tokens, averaged over the asking tokens; float32.

    Args:
        hidden: (B, n, D), what the layer receives.
        columns: (B, Q) columns of the asking tokens.
        keep: (B, Q) which of them count.
    """
    attention, device = layer.self_attn, hidden.device
    columns, keep = columns.to(device), keep.to(device)
    rows = torch.arange(len(hidden), device=device)[:, None]
    cos, sin = (part.to(device) for part in view.position_embeddings)
    normed = layer.input_layernorm(hidden)
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    width = attention.head_dim
    at_queries = cos[rows, columns], sin[rows, columns]
    queries = project_heads(normed[rows, columns], attention.q_proj, query_norm, width, at_queries)  # (B, Q, H, d)
    keys = project_heads(normed, attention.k_proj, key_norm, width, (cos, sin))  # (B, n, Hkv, d)
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
        inputs: the prompts, one image each, as they were given to `respond`.
        responses: what it returned.
        heads: heads by layer; all below the last layer by default.
        query_tokens: "response": the response's tokens ask (without the end-of-sequence token; the last token of a
            response that was cut off does not); "before": the tokens in front of each of them, which predict it.

    Returns:
        Per row a float32 map (heads, h, w) on the CPU, heads by ascending layer and within it in the table's order;
        None for a row without a token that asks.

    Raises:
        ValueError: a row has not exactly one image, or the model lacks a head.
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
    maps: list[list[Tensor]] = [[] for _ in spans]
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
            maps[row].append(weights[row, :, span.start : span.end].unflatten(1, span.grid))
    return [torch.cat(parts) if asks else None for parts, asks in zip(maps, keep.any(1).tolist(), strict=True)]
