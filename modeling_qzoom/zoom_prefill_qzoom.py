"""The zooming prefill: coarse pass, decision, second pass, and all rows in one batch again."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import LayerMasks, layer_states, set_layer_states, take_last
from .backbone_layers_qzoom import causal_mask
from .backbone_plans_qzoom import LayerPlan, last_token_plan
from .rows_qzoom import Positions, pad_left, pick
from .zoom_coarse_qzoom import CoarseView, lay_out, run_to_branch, run_view
from .zoom_decisions_qzoom import decide
from .zoom_model_qzoom import ZoomModel
from .zoom_request_qzoom import ZoomRequest
from .zoom_second_pass_qzoom import fused_prefill


@dataclass(frozen=True)
class Prefill:
    """A batch after all decoder layers.

    Attributes:
        last_hidden: (B, D) state of each row's last token, before the final norm.
        mask: (B, M) of the rows' sequences, crops included; None where no row zoomed.
        positions: positions of the same tokens; None where no row zoomed.
        layer_masks: what the layers hold, where they hold different tokens.
    """

    last_hidden: Tensor
    mask: Tensor | None = None
    positions: Positions | None = None
    layer_masks: LayerMasks | None = None


@dataclass(frozen=True)
class _Part:
    """Some rows after all decoder layers.

    Attributes:
        rows: indices of the rows in the batch.
        last_hidden: (b, D) state of the last token, before the final norm.
        cache: keys and values of all layers.
        positions: positions of all tokens, float32.
        mask: (b, n) long, 0 on padding and on tokens that a prompt's own mask hides.
        upper_mask: (b, u) the same for layers [K, L), which may hold fewer tokens.
    """

    rows: list[int]
    last_hidden: Tensor
    cache: DynamicCache
    positions: Positions
    mask: Tensor
    upper_mask: Tensor


def zoom_prefill(
    model: ZoomModel,
    request: ZoomRequest,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Positions,
    cache: DynamicCache,
) -> Prefill:
    """Steps 1 to 7 on distinct rows; fills the request's reports.

    Args:
        input_ids, attention_mask: (B, N); no mask where nothing is padded.
        cache: empty; filled.
    """
    layer_k, last_layer = model.config.branch_layer, len(model.vlm.get_decoder().layers)
    view = lay_out(model, input_ids, attention_mask, request.encoder_outputs, positions, cache)
    view = run_to_branch(model, view)
    reports, crops = decide(model, request, view)
    request.reports.extend(reports)
    if not crops:
        plans = _upper_plans(request, view.valid, last_layer - layer_k)
        return Prefill(run_view(model, view, layer_k, last_layer, plans)[:, -1])
    zoomed = [crop.row for crop in crops]
    skipped = [row for row in range(len(input_ids)) if row not in zoomed]
    parts = [_Part(zoomed, *fused_prefill(model, request, view, crops))]
    if skipped:
        with run_rows(request.adapters, skipped):
            parts.append(_resume(model, request, view, skipped, cache))
    return _merge(parts, cache, layer_k, last_layer)


def _upper_plans(request: ZoomRequest, valid: Tensor, count: int) -> list[LayerPlan | None] | None:
    """Plans of the `count` layers [K, L) for rows that keep the coarse view."""
    if not request.options.skips_unread:
        return None
    return [None] * (count - 1) + [last_token_plan(valid)]


def _resume(model: ZoomModel, request: ZoomRequest, view: CoarseView, rows: list[int], cache: DynamicCache) -> _Part:
    """Layers [K, L) for the rows that keep the coarse view, without the padding that only longer rows needed."""
    decoder, layer_k = model.vlm.get_decoder(), model.config.branch_layer
    valid = pick(view.valid, rows)
    length = valid.shape[1] - int(valid.argmax(1).min())  # tokens hidden inside a prompt stay in place
    valid = valid[:, -length:]
    hidden = pick(view.hidden, rows)[:, -length:]
    cos, sin = (pick(part, rows)[:, -length:] for part in view.position_embeddings)
    part = replace(
        view,
        valid=valid,
        positions=view.positions.pick(rows).last(length),
        position_embeddings=(cos, sin),
        mask=causal_mask(decoder, hidden, valid, None),
        deepstack=None if view.deepstack is None else view.deepstack.select(rows, length),
        hidden=hidden,
        cache=take_last(decoder.config, cache, layer_k, rows, length),
    )
    last = len(decoder.layers)
    hidden = run_view(model, part, layer_k, last, _upper_plans(request, valid, last - layer_k))
    return _Part(rows, hidden[:, -1], part.cache, Positions(part.positions.values.float()), valid, valid)


def _merge(parts: list[_Part], cache: DynamicCache, layer_k: int, layers: int) -> Prefill:
    """All rows in one left-padded batch, in their original order, keys and values in `cache`."""
    order = [(part, index) for part in parts for index in range(len(part.rows))]
    order.sort(key=lambda item: item[0].rows[item[1]])
    length, upper_length = (max(part.mask.shape[1] for part in parts), max(part.upper_mask.shape[1] for part in parts))
    for layer in range(layers):
        states = [layer_states(part.cache, layer) for part in parts]
        if len(parts) == 1:
            set_layer_states(cache, layer, *states[0])
            continue
        by_part = {id(part): pair for part, pair in zip(parts, states)}
        keys, values = (
            pad_left(
                [by_part[id(part)][kind][index] for part, index in order],
                length if layer < layer_k else upper_length,
                dim=1,
            )
            for kind in (0, 1)
        )
        set_layer_states(cache, layer, keys, values)
    last_hidden = torch.stack([part.last_hidden[index] for part, index in order])
    mask = pad_left([part.mask[index].to(last_hidden.device) for part, index in order], length)
    positions = Positions.stack([part.positions.row(index) for part, index in order], length)
    if all(part.upper_mask is part.mask for part in parts):
        return Prefill(last_hidden, mask, positions)
    upper_mask = pad_left([part.upper_mask[index].to(mask.device) for part, index in order], upper_length)
    by_layer = tuple(int(layer >= layer_k) for layer in range(layers))
    return Prefill(last_hidden, mask, positions, LayerMasks((mask, upper_mask), by_layer))
