"""The second pass over rows that zoom (paper III-C, eq. 8 and 9): keys, values and hidden states of the prefix are
reused below layer K, only crop and suffix are computed there, and layers K … L see the whole fused sequence once."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import LayerMasks, take_columns
from .backbone_layers_qzoom import causal_mask, mask_behind, rotary, run_layers
from .backbone_plans_qzoom import LayerPlan, last_of, last_token_plan
from .prompt_qzoom import VisualFeatures
from .rows_qzoom import Positions, length_mask, pad_left
from .zoom_coarse_qzoom import CoarseView
from .zoom_crops_qzoom import encode_crops
from .zoom_fusion_qzoom import FusedRow, PlacedCrop, fused_deepstack, fused_embeds, plan_rows, upper_plan
from .zoom_model_qzoom import ZoomModel
from .zoom_page_reading_qzoom import with_upper
from .zoom_pages_qzoom import Known
from .zoom_parts_qzoom import Part
from .zoom_request_qzoom import ZoomRequest


@dataclass(frozen=True)
class _Chunk:
    """Crop and suffix of b rows after decoder layer K.

    Attributes:
        hidden: (b, C, D), left-padded.
        cache: keys and values of prefix and chunk in layers [0, K), b rows of P + C columns, each part left-padded.
        present: (b, P + C) long, 0 on padding.
    """

    hidden: Tensor
    cache: DynamicCache
    present: Tensor


def _lengths(rows: list[FusedRow]) -> tuple[list[int], list[int]]:
    """Lengths of every row's prefix and of its chunk."""
    prefixes = [len(row.prefix) for row in rows]
    return prefixes, [row.length - prefix for row, prefix in zip(rows, prefixes)]


def _run_chunk(
    model: ZoomModel, request: ZoomRequest, view: CoarseView, rows: list[FusedRow], features: VisualFeatures
) -> _Chunk:
    """Layers [0, K) over what no prefix covers, on top of the prefixes' keys and values."""
    decoder, layer_k = model.vlm.get_decoder(), model.config.branch_layer
    device = view.embeds.device
    prefixes, chunks = _lengths(rows)
    prefix_length, chunk_length = max(prefixes), max(chunks)
    # a hole of padding may open between a row's prefix and its chunk
    present = torch.cat(
        [length_mask(prefixes, prefix_length, device), length_mask(chunks, chunk_length, device)], dim=1
    )
    visible = [(row.mask[:prefix], row.mask[prefix:]) for row, prefix in zip(rows, prefixes)]
    mask = torch.cat(
        [
            pad_left([before for before, _ in visible], prefix_length),
            pad_left([after for _, after in visible], chunk_length),
        ],
        dim=1,
    ).to(device)  # (b, P + C), 0 also where a prompt hides a token
    prefix_columns = pad_left([row.prefix for row in rows], prefix_length)  # (b, P)
    cache = take_columns(decoder.config, view.cache, layer_k, [row.row for row in rows], prefix_columns)
    embeds = []
    for row, crop_embeds in zip(rows, features.embeds):
        with run_rows(request.adapters, [row.row]):
            embeds.append(fused_embeds(model, view, row, crop_embeds, full=False))
    hidden = pad_left(embeds, chunk_length)  # (b, C, D)
    positions = Positions.stack([row.positions[:, prefix:] for row, prefix in zip(rows, prefixes)], chunk_length)
    with run_rows(request.adapters, [row.row for row in rows], _inserted_at(rows)):
        hidden = run_layers(
            decoder,
            hidden,
            0,
            layer_k,
            mask=causal_mask(decoder, hidden, mask, cache),
            position_embeddings=rotary(decoder, hidden, positions.for_decoder()),
            cache=cache,
            deepstack=fused_deepstack(view, rows, features, chunk_length, full=False),
        )
    return _Chunk(hidden, cache, present)


def _inserted_at(rows: list[FusedRow]) -> list[tuple[int, int]]:
    """Per row: tokens after the inserted block, and its length."""
    return [(len(row.suffix), row.block) for row in rows]


def _close_holes(
    model: ZoomModel, view: CoarseView, rows: list[FusedRow], chunk: _Chunk
) -> tuple[Tensor, DynamicCache]:
    """(b, F, D) inputs of layer K and the cache below it, every row contiguous and left-padded to F."""
    length = max(row.length for row in rows)
    _, chunks = _lengths(rows)
    hidden = pad_left(
        [
            torch.cat([view.hidden[row.row, row.prefix], states[len(states) - count :]])
            for row, states, count in zip(rows, chunk.hidden, chunks)
        ],
        length,
    )
    cache = chunk.cache
    if length < chunk.present.shape[1] or not bool(chunk.present.all()):
        columns = pad_left([present.nonzero()[:, 0] for present in chunk.present], length)  # (b, F)
        decoder_config, layer_k = model.vlm.get_decoder().config, model.config.branch_layer
        cache = take_columns(decoder_config, cache, layer_k, range(len(rows)), columns)
    return hidden, cache


def fused_prefill(model: ZoomModel, request: ZoomRequest, view: CoarseView, crops: list[PlacedCrop]) -> Part:
    """Steps 6 and 7 on the b rows that zoom.

    Args:
        view: the coarse pass; its cache holds keys and values of layers [0, K) and is not changed.

    Returns:
        The rows after all layers, left-padded to the longest fused sequence. Above layer K they may hold fewer tokens.
    """
    decoder, layer_k = model.vlm.get_decoder(), model.config.branch_layer
    features = encode_crops(model.vlm, [placed.crop for placed in crops], view.embeds.device)
    rows = plan_rows(model, request, view, crops)
    hidden, cache = _close_holes(model, view, rows, _run_chunk(model, request, view, rows, features))
    length = hidden.shape[1]
    mask = pad_left([row.mask for row in rows], length).to(hidden.device)
    positions = Positions.stack([row.positions for row in rows], length)
    levels = 0 if view.deepstack is None else len(view.deepstack.levels)
    plan, last = upper_plan(rows, length, hidden.device), len(decoder.layers)
    start = 0
    if plan is None and view.known is not None:  # a plan leaves tokens out, which the page's own states have seen
        known = _known_in_front(with_upper(model, view.known), rows, length)
        known.fill(cache, decoder.layers[layer_k:], lambda page: page.upper or (), hidden.device)
        start = known.end
    hidden, running = hidden[:, start:], mask[:, start:]
    deepstack = fused_deepstack(view, rows, features, length, full=True) if levels > layer_k else None
    plans: list[LayerPlan | None] = [plan] * (last - layer_k)
    if request.options.skips_unread:
        plans[-1] = last_token_plan(running) if plan is None else last_of(plan)
    with run_rows(request.adapters, [row.row for row in rows], _inserted_at(rows)):
        hidden = run_layers(
            decoder,
            hidden,
            layer_k,
            last,
            mask=mask_behind(decoder.config, hidden, mask, start),
            position_embeddings=rotary(decoder, hidden, positions.last(length - start).for_decoder()),
            cache=cache,
            deepstack=deepstack.select(range(len(rows)), length - start) if deepstack is not None else None,
            plans=plans,
            cached=mask[:, :start],
        )
    by_layer = tuple(int(layer >= layer_k) for layer in range(last))
    layer_masks = None if plan is None else LayerMasks((mask, plan.mask), by_layer)
    return Part([row.row for row in rows], hidden[:, -1], cache, positions, mask, layer_masks)


def _known_in_front(known: Known, rows: list[FusedRow], length: int) -> Known:
    """What fused rows know of their prefixes, left-padded to `length`: no more than stands in front of the crop."""
    known = known.pick([row.row for row in rows])
    counts = [min(count, len(row.prefix)) for count, row in zip(known.counts, rows)]
    return Known.of(known.pages, [length - row.length for row in rows], counts)
