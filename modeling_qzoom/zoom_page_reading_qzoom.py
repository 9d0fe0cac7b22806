"""Reads pages: each part once, when the first row asks for it, or all of them for later calls.

The layers of a page are those of a prefill, under the plans of a prefill. What nobody will read of it is not computed:
the last layers above K and of the gate only give keys and values.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .backbone_cache_qzoom import Past
from .backbone_plans_qzoom import LayerPlan, frozen_plan, keys_only_plan
from .backbone_projections_qzoom import device_of
from .prompt_qzoom import VisualFeatures
from .rows_qzoom import Positions, length_mask, pad_left
from .zoom_branch_plans_qzoom import visual_tokens
from .zoom_branches_qzoom import BranchLayers
from .zoom_coarse_qzoom import CoarseView, lay_out, run_to_branch, run_view
from .zoom_model_qzoom import ZoomModel
from .zoom_pages_qzoom import Beginning, BranchStates, KeysAndValues, Known, Page, row_states
from .zoom_request_qzoom import ZoomRequest


def open_pages(
    model: ZoomModel,
    request: ZoomRequest,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Positions,
) -> list[Page | None]:
    """The page that each row of a call continues from: given, or read now for the rows that begin alike.

    Args:
        input_ids, attention_mask, positions: of the distinct rows.
    """
    pages: list[Page | None] = list(request.pages) or [None] * len(input_ids)
    if not request.shared:
        return pages
    firsts = _firsts(attention_mask, len(input_ids))
    beginnings = []
    for shared in request.shared:
        row = shared.rows[0]
        columns = slice(firsts[row], firsts[row] + shared.tokens)
        images = request.encoder_outputs["image"].pick([span.index for span in request.spans[row][: shared.images]])
        beginnings.append(Beginning(input_ids[row, columns], positions.row(row)[:, columns], images))
    for shared, page in zip(request.shared, read_pages(model, beginnings)):
        for row in shared.rows:
            pages[row] = page
    return pages


def known_tokens(
    pages: Sequence[Page | None], rows: Sequence[int], attention_mask: Tensor | None, length: int
) -> Known | None:
    """What some rows of a batch know of their first tokens; None where they have no pages.

    The last token of a row always runs, also where a page ends with it.

    Args:
        attention_mask: (B, length).
    """
    found = [page for row in rows if (page := pages[row]) is not None]
    if not found:
        return None
    firsts = _firsts(attention_mask, len(pages))
    picked = [firsts[row] for row in rows]
    counts = [min(page.tokens, length - first - 1) for page, first in zip(found, picked)]
    return Known.of(found, picked, counts)


def _firsts(attention_mask: Tensor | None, rows: int) -> list[int]:
    """Column of each row's first token."""
    return [0] * rows if attention_mask is None else attention_mask.long().argmax(1).tolist()


def read_pages(model: ZoomModel, beginnings: Sequence[Beginning]) -> list[Page]:
    """Layers [0, K) over the beginnings of some prompts."""
    view = run_to_branch(model, _lay_out(model, beginnings))
    layers = model.vlm.get_decoder().layers[: model.config.branch_layer]
    lower = _states(view, layers, [None] * len(layers))
    return [
        Page(beginning, hidden[len(hidden) - len(beginning.input_ids) :], states)
        for beginning, hidden, states in zip(beginnings, view.hidden, lower)
    ]


def read_completely(model: ZoomModel, page: Page, gate_branch: str, region_branch: str) -> Page:
    """A page with everything that later calls may ask for.

    Args:
        gate_branch, region_branch: `"full"` or `"light"`.
    """
    known = Known.of([page], [0], [page.tokens])
    known = with_region(model, region_branch, with_upper(model, known))
    if model.zoom.gate is not None:
        known = with_gate(model, gate_branch, known)
    return known.pages[0]


def with_upper(model: ZoomModel, known: Known) -> Known:
    """The same rows, with keys and values of layers [K, L) in all of their pages."""
    first, layers = model.config.branch_layer, model.vlm.get_decoder().layers

    def read(pages: list[Page]) -> list[Page]:
        view = _in_front_of_k(model, pages)
        plans: list[LayerPlan | None] = [None] * (len(layers) - first)
        plans[-1] = keys_only_plan(view.valid)
        run_view(model, view, first, len(layers), plans)
        return [replace(page, upper=part) for page, part in zip(pages, _states(view, layers[first:], plans))]

    return _completed(known, lambda page: page.upper is None, read)


def with_gate(model: ZoomModel, kind: str, known: Known) -> Known:
    """The same rows, with what the gate knows of their pages."""
    gate = model.zoom.gate
    assert gate is not None

    def read(pages: list[Page]) -> list[Page]:
        view = _in_front_of_k(model, pages)
        plans = _branch_plans(model, kind, view, len(gate.layers))
        plans[-1] = keys_only_plan(view.valid)
        parts = _read_branch(gate, view, kind, plans)[0]
        return [replace(page, gate=part) for page, part in zip(pages, parts)]

    return _completed(known, lambda page: page.gate is None or page.gate.kind != kind, read)


def with_region(model: ZoomModel, kind: str, known: Known) -> Known:
    """The same rows, with what the region branch knows of their pages."""
    region = model.zoom.region

    def read(pages: list[Page]) -> list[Page]:
        view = _in_front_of_k(model, pages)
        plans = _branch_plans(model, kind, view, len(region.layers))
        parts, hidden = _read_branch(region, view, kind, plans)
        outputs = [states[len(states) - page.tokens :] for page, states in zip(pages, hidden)]
        return [
            replace(page, region=replace(part, outputs=states)) for page, part, states in zip(pages, parts, outputs)
        ]

    return _completed(known, lambda page: page.region is None or page.region.kind != kind, read)


def branch_past(
    branch: BranchLayers, known: Known, part: Callable[[Page], BranchStates | None], device: torch.device
) -> Past:
    """What the layers of a branch know of the rows' first columns.

    Args:
        part: what the branch knows of a page, which must have been read.
        device: where offloaded layers run.
    """

    def states(page: Page) -> BranchStates:
        found = part(page)
        assert found is not None
        return found

    def outputs(page: Page) -> Tensor:
        found = states(page).outputs
        assert found is not None
        return found

    cache = DynamicCache()
    known.fill(cache, branch.layers, lambda page: states(page).layers, device)
    has_outputs = states(known.pages[0]).outputs is not None
    return Past(cache, known.visible(device), known.join(outputs, device) if has_outputs else None)


def _completed(known: Known, lacks: Callable[[Page], bool], read: Callable[[list[Page]], list[Page]]) -> Known:
    """The same rows, with every page that lacks something read once."""
    lacking = list({id(page): page for page in known.pages if lacks(page)}.values())
    if not lacking:
        return known
    complete = dict(zip(map(id, lacking), read(lacking)))
    return replace(known, pages=tuple(complete.get(id(page), page) for page in known.pages))


def _lay_out(model: ZoomModel, beginnings: Sequence[Beginning]) -> CoarseView:
    """Beginnings in front of layer 0, left-padded."""
    lengths = [len(beginning.input_ids) for beginning in beginnings]
    length, device = max(lengths), device_of(model.get_input_embeddings(), beginnings[0].input_ids.device)
    return lay_out(
        model,
        pad_left([beginning.input_ids.to(device) for beginning in beginnings], length),
        length_mask(lengths, length, device),
        {"image": VisualFeatures.join([beginning.images for beginning in beginnings])},
        Positions.stack([beginning.positions.to(device) for beginning in beginnings], length),
        DynamicCache(),
    )


def _in_front_of_k(model: ZoomModel, pages: Sequence[Page]) -> CoarseView:
    """Pages in front of layer K, left-padded, with an empty cache."""
    view = _lay_out(model, [page.beginning for page in pages])
    hidden = pad_left([page.hidden.to(view.embeds.device) for page in pages], view.embeds.shape[1])
    return replace(view, hidden=hidden)


def _branch_plans(model: ZoomModel, kind: str, view: CoarseView, count: int) -> list[LayerPlan | None]:
    """Plans of the layers of a branch over pages."""
    if kind == "full":
        return [None] * count
    return [frozen_plan(view.valid, visual_tokens(model.config, view.input_ids))] * count


def _read_branch(
    branch: BranchLayers, view: CoarseView, kind: str, plans: list[LayerPlan | None]
) -> tuple[list[BranchStates], Tensor]:
    """What the layers of a branch know of every page, and the states behind the last of them."""
    assert view.cache is not None
    past = Past(view.cache, view.valid[:, :0])
    hidden = branch.run(view.hidden, view.mask, view.position_embeddings, plans, past)
    return [BranchStates(kind, states) for states in _states(view, branch.layers, plans)], hidden


def _states(
    view: CoarseView, layers: Iterable[nn.Module], plans: Sequence[LayerPlan | None]
) -> list[tuple[KeysAndValues, ...]]:
    """Per row keys and values of all its tokens, in the order of the sequence, by layer."""
    assert view.cache is not None
    masks = {id(plan): (view.valid if plan is None else plan.mask).cpu() for plan in plans}
    columns = {key: [row.nonzero()[:, 0] for row in mask] for key, mask in masks.items()}
    return [
        row_states(view.cache, layers, row, [columns[id(plan)][row] for plan in plans])
        for row in range(len(view.valid))
    ]
