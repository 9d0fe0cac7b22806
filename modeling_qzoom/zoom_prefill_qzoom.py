"""The zooming prefill: coarse pass, decision, second pass, and all rows in one batch again."""

from dataclasses import replace

from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import take_last
from .backbone_plans_qzoom import LayerPlan, last_token_plan
from .report_qzoom import ZoomReport
from .rows_qzoom import Positions, pick
from .zoom_coarse_qzoom import CoarseView, lay_out, pick_rows, rows_length, run_to_branch, run_view
from .zoom_decisions_qzoom import decide
from .zoom_fusion_qzoom import PlacedCrop
from .zoom_model_qzoom import ZoomModel
from .zoom_page_reading_qzoom import known_tokens, open_pages, with_upper
from .zoom_pages_qzoom import Page
from .zoom_parts_qzoom import Part, Prefill, merge_parts
from .zoom_request_qzoom import ZoomRequest
from .zoom_second_pass_qzoom import fused_prefill


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
    parts: list[Part] = []
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
        return Prefill(merge_parts(parts, cache, layers).last_hidden if len(parts) > 1 else parts[0].last_hidden)
    return merge_parts(parts, cache, layers)


def _groups(pages: list[Page | None]) -> list[list[int]]:
    """Rows that run together: those that continue from pages, and those that run from their first token on."""
    reading = [row for row, page in enumerate(pages) if page is None]
    continuing = [row for row, page in enumerate(pages) if page is not None]
    return [rows for rows in (reading, continuing) if rows]


def _finish(model: ZoomModel, request: ZoomRequest, view: CoarseView, crops: list[PlacedCrop]) -> list[Part]:
    """Layers [K, L) of rows that run together: on the fused sequences of those that zoom, and on the others' own."""
    if not crops:
        return [_keep_coarse(model, request, view, list(range(len(view.hidden))))]
    if view.known is not None and any(crop.kept is None for crop in crops):
        view = replace(view, known=with_upper(model, view.known))  # once for those that zoom and those that do not
    zoomed = {crop.row for crop in crops}
    skipped = [row for row in range(len(view.hidden)) if row not in zoomed]
    parts = [fused_prefill(model, request, view, crops)]
    if skipped:
        assert view.cache is not None
        decoder_config, length = model.vlm.get_decoder().config, rows_length(view, skipped)
        cache = take_last(decoder_config, view.cache, model.config.branch_layer, skipped, length)
        with run_rows(request.adapters, skipped):
            part = pick_rows(model, view, skipped, length, cache)
            parts.append(_keep_coarse(model, request, part, skipped))
    return parts


def _keep_coarse(model: ZoomModel, request: ZoomRequest, view: CoarseView, rows: list[int]) -> Part:
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
    return Part(rows, hidden[:, -1], view.cache, Positions(view.positions.values.float()), view.valid)
