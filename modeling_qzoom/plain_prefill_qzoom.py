"""A prefill of rows that do not zoom: each under its configuration of VISOR, no token in a layer that nobody reads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import LayerMasks, pick_cache
from .backbone_layers_qzoom import causal_mask
from .rows_qzoom import Positions, pick
from .visor_configurations_qzoom import DENSE, SELF, by_row, is_routed, layer_kinds
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
    visor, cache = model.config.visor, DynamicCache(config=model.vlm.get_decoder().config)
    view = _trimmed(model, view, rows, cache)
    if visor is None or not is_routed(visor, name):
        yield name, _finish(model, request, view, rows, _kinds(model, name), [])
        return
    assert model.visor is not None
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
            part = _picked(model, view, places)
            yield choices[choice], _finish(model, request, part, chosen, _kinds(model, choices[choice]), plans)


def _trimmed(model: ZoomModel, view: CoarseView, rows: list[int], cache: DynamicCache) -> CoarseView:
    """Rows of a view in front of layer 0, without the padding that only longer rows needed."""
    valid = pick(view.valid, rows)
    length = valid.shape[1] - int(valid.argmax(1).min())
    valid, hidden = valid[:, -length:], pick(view.hidden, rows)[:, -length:]
    cos, sin = (pick(table, rows)[:, -length:] for table in view.position_embeddings)
    return replace(
        view,
        input_ids=pick(view.input_ids, rows)[:, -length:],
        valid=valid,
        positions=view.positions.pick(rows).last(length),
        position_embeddings=(cos, sin),
        mask=causal_mask(model.vlm.get_decoder(), hidden, valid, None),
        deepstack=None if view.deepstack is None else view.deepstack.select(rows, length),
        hidden=hidden,
        cache=cache,
    )


def _picked(model: ZoomModel, view: CoarseView, rows: list[int]) -> CoarseView:
    """Rows of a view between two layers, as long as they were."""
    assert view.cache is not None
    decoder, hidden, valid = model.vlm.get_decoder(), pick(view.hidden, rows), pick(view.valid, rows)
    cos, sin = (pick(table, rows) for table in view.position_embeddings)
    return replace(
        view,
        input_ids=pick(view.input_ids, rows),
        valid=valid,
        positions=view.positions.pick(rows),
        position_embeddings=(cos, sin),
        mask=causal_mask(decoder, hidden, valid, None),
        deepstack=None if view.deepstack is None else view.deepstack.select(rows, valid.shape[1]),
        hidden=hidden,
        cache=pick_cache(decoder.config, view.cache, rows),
    )


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
