"""A prefill of rows that do not zoom: each under its configuration of VISOR, no token in a layer that nobody reads."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import LayerMasks
from .backbone_layers_qzoom import causal_mask
from .rows_qzoom import Positions, pick
from .visor_configurations_qzoom import DENSE, SELF, by_row, layer_kinds
from .visor_plans_qzoom import Plans, answering_plan, frozen_tokens, layer_plans
from .zoom_coarse_qzoom import CoarseView, lay_out, run_view
from .zoom_decisions_qzoom import plain_reports
from .zoom_model_qzoom import ZoomModel
from .zoom_parts_qzoom import Part, merge_parts
from .zoom_prefill_qzoom import Prefill
from .zoom_request_qzoom import ZoomRequest


def plain_prefill(
    model: ZoomModel,
    request: ZoomRequest,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Positions,
    cache: DynamicCache,
) -> Prefill:
    """All layers over distinct rows; fills the request's reports.

    Args:
        input_ids, attention_mask: (B, N); no mask where nothing is padded.
        cache: empty; filled.
    """
    decoder = model.vlm.get_decoder()
    names = by_row(request.options.vision, len(input_ids))
    reports = plain_reports(model.config, input_ids, "off")
    request.reports.extend(replace(report, vision=name) for report, name in zip(reports, names))
    view = lay_out(model, input_ids, attention_mask, request.encoder_outputs, positions, cache)
    if set(names) == {DENSE}:
        plans = _layer_plans(model, request, view, DENSE)
        return Prefill(run_view(model, view, 0, len(decoder.layers), plans)[:, -1])
    parts = []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        with run_rows(request.adapters, rows):
            parts.append(_run_rows(model, request, view, rows, name))
    return merge_parts(parts, cache, len(decoder.layers))


def _run_rows(model: ZoomModel, request: ZoomRequest, view: CoarseView, rows: list[int], name: str) -> Part:
    """All layers over the rows of one configuration, without the padding that only longer rows needed."""
    decoder = model.vlm.get_decoder()
    valid = pick(view.valid, rows)
    length = valid.shape[1] - int(valid.argmax(1).min())
    valid, hidden = valid[:, -length:], pick(view.hidden, rows)[:, -length:]
    cos, sin = (pick(table, rows)[:, -length:] for table in view.position_embeddings)
    part = replace(
        view,
        input_ids=pick(view.input_ids, rows)[:, -length:],
        valid=valid,
        positions=view.positions.pick(rows).last(length),
        position_embeddings=(cos, sin),
        mask=causal_mask(decoder, hidden, valid, None),
        deepstack=None if view.deepstack is None else view.deepstack.select(rows, length),
        hidden=hidden,
        cache=DynamicCache(config=decoder.config),
    )
    plans = _layer_plans(model, request, part, name)
    hidden = run_view(model, part, 0, len(decoder.layers), plans)
    positions = Positions(part.positions.values.float())
    return Part(rows, hidden[:, -1], part.cache, positions, valid, _layer_masks(plans, valid))


def _layer_plans(model: ZoomModel, request: ZoomRequest, view: CoarseView, name: str) -> Plans:
    """Per layer who takes part. In the last one, unless told otherwise, only the last token is updated."""
    kinds = layer_kinds(model.config.visor, name) or SELF * len(model.vlm.get_decoder().layers)
    plans = layer_plans(kinds, view.valid, frozen_tokens(model.config, view.input_ids, view.valid))
    if request.options.skips_unread:
        plans[-1] = answering_plan(kinds[-1], plans[-1], view.valid)
    return plans


def _layer_masks(plans: Plans, valid: Tensor) -> LayerMasks:
    """What the layers hold: all tokens where there is no plan."""
    masks: list[Tensor] = [valid]
    numbers: dict[int, int] = {}
    for plan in plans:
        if plan is not None and id(plan) not in numbers:
            same = torch.equal(plan.mask, valid)
            numbers[id(plan)] = 0 if same else len(masks)
            if not same:
                masks.append(plan.mask)
    return LayerMasks(tuple(masks), tuple(0 if plan is None else numbers[id(plan)] for plan in plans))
