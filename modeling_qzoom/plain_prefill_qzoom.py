"""A prefill of rows that do not zoom: each under its configuration of VISOR, no token in a layer that nobody reads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import LayerMasks, pick_cache
from .rows_qzoom import Positions
from .visor_configurations_qzoom import DENSE, SELF, by_row, is_routed, layer_kinds
from .visor_plans_qzoom import Plans, answering_plan, frozen_tokens, layer_plans
from .zoom_coarse_qzoom import CoarseView, lay_out, pick_rows, rows_length, run_view
from .zoom_decisions_qzoom import plain_reports
from .zoom_model_qzoom import ZoomModel
from .zoom_parts_qzoom import Part, Prefill, merge_parts
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
    view = lay_out(model, input_ids, attention_mask, request.encoder_outputs, positions, cache)
    parts = []
    if set(names) != {DENSE}:
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            with run_rows(request.adapters, rows):
                for chosen, part in _run_rows(model, request, view, rows, name):
                    parts.append(part)
                    for row in part.rows:
                        names[row] = chosen
    reports = plain_reports(model.config, input_ids, "off")
    request.reports.extend(replace(report, vision=name) for report, name in zip(reports, names))
    if parts:
        return merge_parts(parts, cache, len(decoder.layers))
    plans = _finishing(request, SELF * len(decoder.layers), [None] * len(decoder.layers), view.valid)
    return Prefill(run_view(model, view, 0, len(decoder.layers), plans)[:, -1])


def _kinds(model: ZoomModel, name: str) -> str:
    """The letters of a configuration, of the plain model too."""
    return layer_kinds(model.config.visor, name) or SELF * len(model.vlm.get_decoder().layers)


def _run_rows(
    model: ZoomModel, request: ZoomRequest, view: CoarseView, rows: list[int], name: str
) -> Iterator[tuple[str, Part]]:
    """The rows of one configuration through all layers; with the router's choices, by choice."""
    visor, decoder_config = model.config.visor, model.vlm.get_decoder().config
    length = rows_length(view, rows)
    view = pick_rows(model, view, rows, length, DynamicCache(config=decoder_config))
    if visor is None or not is_routed(visor, name):
        yield name, _finish(model, request, view, rows, _kinds(model, name), [])
        return
    assert model.visor is not None and view.cache is not None
    layer, choices = visor["router"]["layer"], visor["router"]["choices"]
    frozen = frozen_tokens(model.config, view.input_ids, view.valid)
    done = layer_plans(_kinds(model, choices[0])[:layer], view.valid, frozen)
    view = replace(view, hidden=run_view(model, view, 0, layer, done))
    picked = model.visor.router(view.hidden[:, -1]).argmax(-1).tolist()
    for choice in dict.fromkeys(picked):
        places = [place for place, other in enumerate(picked) if other == choice]
        chosen = [rows[place] for place in places]
        plans = [None if plan is None else plan.pick(places) for plan in done]
        with run_rows(request.adapters, chosen):
            part = pick_rows(model, view, places, length, pick_cache(decoder_config, view.cache, places))
            yield choices[choice], _finish(model, request, part, chosen, _kinds(model, choices[choice]), plans)


def _finish(
    model: ZoomModel, request: ZoomRequest, view: CoarseView, rows: list[int], kinds: str, done: Plans
) -> Part:
    """The layers behind those that are done, for rows of one configuration."""
    plans = layer_plans(kinds, view.valid, frozen_tokens(model.config, view.input_ids, view.valid))[len(done) :]
    plans = _finishing(request, kinds, [*done, *plans], view.valid)
    hidden = run_view(model, view, len(done), len(kinds), plans[len(done) :])
    assert view.cache is not None
    positions = Positions(view.positions.values.float())
    return Part(rows, hidden[:, -1], view.cache, positions, view.valid, _layer_masks(plans, view.valid))


def _finishing(request: ZoomRequest, kinds: str, plans: Plans, valid: Tensor) -> Plans:
    """The plans of all layers; in the last one, unless told otherwise, only the last token is updated."""
    if not request.options.skips_unread:
        return plans
    return [*plans[:-1], answering_plan(kinds[-1], plans[-1], valid)]


def _layer_masks(plans: Sequence, valid: Tensor) -> LayerMasks:
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
