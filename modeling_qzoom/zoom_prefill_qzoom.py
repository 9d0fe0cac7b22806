"""The zooming prefill: coarse pass, decision, second pass, and all rows in one batch again."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import layer_states, set_layer_states, take_last
from .backbone_layers_qzoom import causal_mask
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
    """

    last_hidden: Tensor
    mask: Tensor | None = None
    positions: Positions | None = None


@dataclass(frozen=True)
class _Part:
    """Some rows after all decoder layers.

    Attributes:
        rows: indices of the rows in the batch.
        last_hidden: (b, D) state of the last token, before the final norm.
        cache: keys and values of all layers.
        positions: positions of all tokens, float32.
        mask: (b, n) long, 0 on padding and on tokens that a prompt's own mask hides.
    """

    rows: list[int]
    last_hidden: Tensor
    cache: DynamicCache
    positions: Positions
    mask: Tensor


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
        return Prefill(run_view(model, view, layer_k, last_layer)[:, -1])
    zoomed = [crop.row for crop in crops]
    skipped = [row for row in range(len(input_ids)) if row not in zoomed]
    parts = [_Part(zoomed, *fused_prefill(model, request, view, crops))]
    if skipped:
        with run_rows(request.adapters, skipped):
            parts.append(_resume(model, view, skipped, cache))
    return _merge(parts, cache, last_layer)


def _resume(model: ZoomModel, view: CoarseView, rows: list[int], cache: DynamicCache) -> _Part:
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
    hidden = run_view(model, part, layer_k, len(decoder.layers))
    return _Part(rows, hidden[:, -1], part.cache, Positions(part.positions.values.float()), valid)


def _merge(parts: list[_Part], cache: DynamicCache, layers: int) -> Prefill:
    """All rows in one left-padded batch, in their original order, keys and values in `cache`."""
    order = [(part, index) for part in parts for index in range(len(part.rows))]
    order.sort(key=lambda item: item[0].rows[item[1]])
    length = max(part.mask.shape[1] for part in parts)
    for layer in range(layers):
        states = [layer_states(part.cache, layer) for part in parts]
        if len(parts) == 1:
            set_layer_states(cache, layer, *states[0])
            continue
        by_part = {id(part): pair for part, pair in zip(parts, states)}
        keys, values = (
            pad_left([by_part[id(part)][kind][index] for part, index in order], length, dim=1) for kind in (0, 1)
        )
        set_layer_states(cache, layer, keys, values)
    last_hidden = torch.stack([part.last_hidden[index] for part, index in order])
    mask = pad_left([part.mask[index].to(last_hidden.device) for part, index in order], length)
    positions = Positions.stack([part.positions.row(index) for part, index in order], length)
    return Prefill(last_hidden, mask, positions)
