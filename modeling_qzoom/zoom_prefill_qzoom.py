"""The zooming prefill: coarse pass, decision, second pass, and all rows in one batch again."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import LayerMasks, layer_states, set_layer_states
from .backbone_plans_qzoom import LayerPlan, last_token_plan
from .report_qzoom import ZoomReport
from .rows_qzoom import Positions, pad_left, pick
from .zoom_coarse_qzoom import CoarseView, lay_out, pick_rows, run_to_branch, run_view
from .zoom_decisions_qzoom import decide
from .zoom_fusion_qzoom import PlacedCrop
from .zoom_model_qzoom import ZoomModel
from .zoom_page_reading_qzoom import known_tokens, open_pages, with_upper
from .zoom_pages_qzoom import Page
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
    layers = len(model.vlm.get_decoder().layers)
    pages = open_pages(model, request, input_ids, attention_mask, positions)
    groups = _groups(pages)
    parts: list[_Part] = []
    reports: dict[int, ZoomReport] = {}
    for rows in groups:
        asked = request if len(groups) == 1 else request.pick(rows)
        view = lay_out(
            model,
            pick(input_ids, rows),
            None if attention_mask is None else pick(attention_mask, rows),
            asked.encoder_outputs,
            positions.pick(rows),
            cache if len(groups) == 1 else DynamicCache(config=model.vlm.get_decoder().config),
            known_tokens(pages, rows, attention_mask, input_ids.shape[1]),
        )
        view = run_to_branch(model, view)
        decided, crops = decide(model, asked, view)
        reports |= zip(rows, decided)
        parts += [replace(part, rows=[rows[row] for row in part.rows]) for part in _finish(model, asked, view, crops)]
    request.reports.extend(reports[row] for row in range(len(input_ids)))
    if not any(report.zoomed for report in reports.values()):  # the rows are padded as the prompts are
        return Prefill(_merge(parts, cache, 0, layers).last_hidden if len(parts) > 1 else parts[0].last_hidden)
    return _merge(parts, cache, model.config.branch_layer, layers)


def _groups(pages: list[Page | None]) -> list[list[int]]:
    """Rows that run together: those that continue from pages, and those that run from their first token on."""
    reading = [row for row, page in enumerate(pages) if page is None]
    continuing = [row for row, page in enumerate(pages) if page is not None]
    return [rows for rows in (reading, continuing) if rows]


def _finish(model: ZoomModel, request: ZoomRequest, view: CoarseView, crops: list[PlacedCrop]) -> list[_Part]:
    """Layers [K, L) of rows that run together: on the fused sequences of those that zoom, and on the others' own."""
    if not crops:
        return [_keep_coarse(model, request, view, list(range(len(view.hidden))))]
    if view.known is not None and any(crop.kept is None for crop in crops):
        view = replace(view, known=with_upper(model, view.known))  # once for those that zoom and those that do not
    zoomed = [crop.row for crop in crops]
    skipped = [row for row in range(len(view.hidden)) if row not in zoomed]
    parts = [_Part(zoomed, *fused_prefill(model, request, view, crops))]
    if skipped:
        with run_rows(request.adapters, skipped):
            parts.append(_keep_coarse(model, request, pick_rows(model, view, skipped), skipped))
    return parts


def _keep_coarse(model: ZoomModel, request: ZoomRequest, view: CoarseView, rows: list[int]) -> _Part:
    """Layers [K, L) over prompts as they are.

    Args:
        rows: indices of the view's rows.
    """
    layers, layer_k = model.vlm.get_decoder().layers, model.config.branch_layer
    assert view.cache is not None
    if view.known is not None:
        known = with_upper(model, view.known)
        known.fill(view.cache, layers[layer_k:], lambda page: page.upper or (), view.hidden.device)
    plans: list[LayerPlan | None] = [None] * (len(layers) - layer_k)
    if request.options.skips_unread:
        plans[-1] = last_token_plan(view.valid[:, view.start :])
    hidden = run_view(model, view, layer_k, len(layers), plans)
    return _Part(rows, hidden[:, -1], view.cache, Positions(view.positions.values.float()), view.valid, view.valid)


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
