"""Training passes of `forward`: the branches on the coarse view, and the decoder on the fused sequence."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone_layers_qzoom import causal_mask, rotary, run_layers
from .errors_qzoom import CropError, InputError, UnsupportedError
from .prompt_qzoom import ImageSpan, VisualFeatures, prompt_images
from .rows_qzoom import Positions, pad_left
from .source_images_qzoom import SourceInput
from .zoom_branch_plans_qzoom import region_plans
from .zoom_coarse_qzoom import CoarseView, coarse_view, run_to_branch
from .zoom_crops_qzoom import crop_recipe, cut_crop, encode_crops
from .zoom_decisions_qzoom import branch_inputs, decide, gate_logits, image_heatmap, region_maps
from .zoom_foveation_qzoom import kept_cells
from .zoom_fusion_qzoom import (
    FusedRow,
    PlacedCrop,
    fused_deepstack,
    fused_embeds,
    plain_row,
    plan_rows,
    upper_plan,
)
from .zoom_model_qzoom import ZoomModel
from .zoom_options_qzoom import ZoomOptions, resolve_options
from .zoom_regions_qzoom import Box, pixels_to_cells
from .zoom_request_qzoom import ZoomRequest, collect_grid_boxes, collect_sources


IGNORED = -100


class _WithoutGradient(torch.autograd.Function):
    """Hands a tensor on unchanged; on the way back, the other inputs learn that there is no gradient for them."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *others: Tensor) -> Tensor:
        ctx.mark_dirty(output)  # a view instead would forbid in-place changes, which Trainer makes
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *(None for _ in ctx.needs_input_grad[1:]))


def with_unused(output: Tensor | None, unused: Iterable[Tensor]) -> Tensor | None:
    """Makes what a pass did not use a part of its graph.

    DistributedDataParallel waits until it has heard of every trainable weight. Those that are named here are heard of
    in every backward pass. No value changes, and where nobody waits their gradients stay None.

    Args:
        output: a loss or logits, whose values are not needed by the backward pass of anything computed so far.
        unused: weights, or tensors computed from them, that `output` does not depend on.
    """
    trainable = [tensor for tensor in unused if tensor.requires_grad]
    if output is None or not output.requires_grad or not torch.is_grad_enabled() or not trainable:
        return output
    return _WithoutGradient.apply(output, *trainable)


def _last_valid(valid: Tensor) -> Tensor:
    """(B, 1) column of each row's last token."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return (valid * columns).argmax(dim=1, keepdim=True)


def masked_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over targets that are not -100; zero, with gradient, when there are none.

    Raises:
        InputError: a target is none of 1, 0 and -100.
    """
    keep = targets != IGNORED
    if not ((targets == 0) | (targets == 1) | ~keep).all():
        raise InputError("targets must be 1, 0 or -100 (ignored); others were given.")
    if not keep.any():
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits[keep], targets[keep].to(logits.dtype))


def _as_numbers(targets: Any) -> Tensor:
    """Targets as a tensor that can hold -100, which one of booleans cannot."""
    targets = torch.as_tensor(targets)
    return targets.long() if targets.dtype == torch.bool else targets


def _region_targets_by_image(targets: Any, row: int, spans: list[ImageSpan]) -> list[Tensor]:
    """One (Q, h, w) map per image of a row."""
    maps = list(targets) if isinstance(targets, (list, tuple)) else [targets]
    if len(maps) != len(spans):
        raise InputError(
            f"region_targets: row {row} has {len(maps)} maps and {len(spans)} images; give a (Q, h, w) map per image."
        )
    maps = [_as_numbers(part) for part in maps]
    return [part[None] if part.ndim == 2 else part for part in maps]


def region_loss(logits: list[list[Tensor]], targets: list[list[Tensor]]) -> Tensor:
    """BCE over the labelled cells of all rows, images and queries (paper III-C; cells labelled -100 do not count).

    Args:
        logits: region logits per row and image, (Q, h, w).
        targets: labels per row and image, in {1, 0, -100}; of another grid than the logits if they were made at
            another budget.
    """
    flat_logits, flat_targets = [], []
    for row_logits, row_targets in zip(logits, targets):
        for scores, labels in zip(row_logits, row_targets):
            if scores.shape[0] != labels.shape[0]:
                raise InputError(
                    f"region_targets has {labels.shape[0]} maps for an image that {scores.shape[0]} queries ask about."
                )
            if scores.shape[1:] != labels.shape[1:]:
                scores = F.interpolate(scores[None], labels.shape[1:], mode="bilinear", align_corners=False)[0]
            flat_logits.append(scores.flatten())
            flat_targets.append(labels.to(scores.device).flatten())
    return masked_bce(torch.cat(flat_logits), torch.cat(flat_targets))


def branch_pass(
    model: ZoomModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    vision: dict[str, Any],
    region_targets: Any,
    gate_targets: Any,
    query_positions: Tensor | None,
) -> dict[str, Any]:
    """Losses and logits of the branches; arguments as in `forward`."""
    view = run_to_branch(model, coarse_view(model, input_ids, attention_mask, vision))
    if query_positions is None:
        query_positions = _last_valid(view.valid)
    _check_queries(query_positions, input_ids)
    absent = query_positions < 0
    queries = query_positions.clamp(min=0)
    result: dict[str, Any] = {}
    if gate_targets is not None:
        result |= _gate_results(model, view, gate_targets, queries[:, :1], absent[:, 0])
    if region_targets is not None:
        if len(region_targets) != len(input_ids):
            raise InputError(f"region_targets has {len(region_targets)} rows, the batch {len(input_ids)}.")
        spans = prompt_images(model.config, input_ids, vision.get("image_grid_thw"))
        rows = [row for row, targets in enumerate(region_targets) if targets is not None]
        without = [row for row in rows if not spans[row]]
        if without:
            raise InputError(f"region_targets: rows {without} have targets but no image.")
        maps_by_row: list[list[Tensor]] = [[] for _ in spans]
        targets_by_row: list[list[Tensor]] = [[] for _ in spans]
        if rows:
            for row, maps in zip(rows, region_maps(model, _branch_options(model), view, rows, spans, queries[rows])):
                maps_by_row[row] = maps.logits
                targets_by_row[row] = _region_targets_by_image(region_targets[row], row, spans[row])
                hidden = absent[row].nonzero()[:, 0].tolist()
                if hidden:
                    targets_by_row[row] = [_ignore_queries(part, hidden) for part in targets_by_row[row]]
            result["region_loss"] = region_loss(maps_by_row, targets_by_row)
        else:
            # the branch runs all the same: other processes, whose rows have targets, wait for this one
            hidden_states, mask, position_embeddings = branch_inputs(model.vlm.get_decoder(), view, [0])
            query = queries[:1, :1].to(hidden_states.device)
            plans = region_plans(model.config, _branch_options(model), view.input_ids[:1], view.valid[:1], query)
            scores, _ = model.zoom.region(hidden_states, mask, position_embeddings, query, query, plans)
            result["region_loss"] = scores.sum() * 0.0
        result["region_logits"] = maps_by_row
    losses = [name for name in ("region_loss", "gate_loss") if name in result]
    unused = _unused_by_branches(model, view, has_region=region_targets is not None, has_gate=gate_targets is not None)
    for name in losses:
        result[name] = with_unused(result[name], unused)
    result["loss"] = sum(result[name] for name in losses)
    return result


def _gate_results(
    model: ZoomModel, view: CoarseView, gate_targets: Any, queries: Tensor, absent: Tensor
) -> dict[str, Any]:
    """Logits and loss of the gate.

    Args:
        queries: (B, 1) columns of the asking tokens.
        absent: (B,) bool, rows in which nothing asks.
    """
    if model.zoom.gate is None:
        raise UnsupportedError("gate_targets were given, but this model has no gate (config.has_gate is False).")
    targets, rows = _as_numbers(gate_targets), len(view.input_ids)
    if targets.shape != (rows,):
        raise InputError(f"gate_targets must be one number per row, ({rows},), got shape {tuple(targets.shape)}.")
    logits = gate_logits(model, _branch_options(model), view, list(range(rows)), queries)
    answered = targets.to(logits.device).masked_fill(absent.to(logits.device), IGNORED)
    return {"gate_logits": logits, "gate_loss": masked_bce(logits, answered)}


def _branch_options(model: ZoomModel) -> ZoomOptions:
    """Branches train as the config has them; all of their last layer runs, since any column may be read."""
    kinds = {name: getattr(model.config, name) for name in ("gate_branch", "region_branch")}
    return ZoomOptions(**kinds, skip_unread=False)


def _unused_by_branches(model: ZoomModel, view: CoarseView, *, has_region: bool, has_gate: bool) -> list[Tensor]:
    """What a branch pass leaves out: all above layer K, a branch without targets, and the router."""
    others: list[nn.Module] = [] if has_region else [model.zoom.region]
    if model.zoom.gate is not None and not has_gate:
        others.append(model.zoom.gate)
    if model.visor is not None:
        others.append(model.visor)
    return unused_above(model, view, model.config.branch_layer, others)


def unused_above(model: ZoomModel, view: CoarseView, layer: int, others: Iterable[nn.Module]) -> list[Tensor]:
    """What a pass that ends in front of a layer leaves out.

    Args:
        view: what the pass began with.
        layer: first layer that does not run.
        others: modules beside the VLM that do not run either.
    """
    decoder = model.vlm.get_decoder()
    parts = [*decoder.layers[layer:], decoder.norm, model.get_output_embeddings(), *others]
    tied = {id(weight) for weight in model.get_input_embeddings().parameters()}
    weights = [weight for part in parts for weight in part.parameters() if id(weight) not in tied]
    return weights if view.deepstack is None else [*weights, *view.deepstack.levels[layer:]]


def _check_queries(query_positions: Tensor, input_ids: Tensor) -> None:
    rows, length = input_ids.shape
    if query_positions.ndim != 2 or len(query_positions) != rows or int(query_positions.max()) >= length:
        raise InputError(
            f"query_positions must be ({rows}, Q) columns below {length}, or -1, got shape "
            f"{tuple(query_positions.shape)} with a largest value of {int(query_positions.max())}."
        )


def _ignore_queries(targets: Tensor, queries: list[int]) -> Tensor:
    targets = targets.clone()
    targets[queries] = IGNORED
    return targets


def _given_crops(
    model: ZoomModel, request: ZoomRequest, zoom_boxes: Sequence[Any], device: torch.device
) -> list[PlacedCrop]:
    """Crops of the boxes that the caller chose."""
    recipe = crop_recipe(model.config, request.options)
    if len(zoom_boxes) != len(request.spans):
        raise InputError(f"zoom_boxes has {len(zoom_boxes)} rows, the batch {len(request.spans)}.")
    crops = []
    for row, entry in enumerate(zoom_boxes):
        if entry is None:
            continue
        entry = entry.tolist() if isinstance(entry, Tensor) else entry
        image, corners = entry if len(entry) == 2 else (0, entry)
        if not 0 <= image < len(request.spans[row]):
            raise InputError(f"zoom_boxes: row {row} names image {image}, it has {len(request.spans[row])} images.")
        span = request.spans[row][image]
        source = request.sources[span.index]
        if len(corners) != 4:
            raise InputError(f"zoom_boxes: row {row} holds {entry!r}; a box has four numbers (x0, y0, x1, y1).")
        x0, y0, x1, y1 = (int(value) for value in corners)
        box: Box = (x0, y0, x1, y1)
        height, width = source.shape[1:]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InputError(
                f"zoom_boxes: the box {box} of row {row} is empty or leaves its image of {width} × {height} pixels; "
                "boxes are (x0, y0, x1, y1) in source pixels, end exclusive."
            )
        try:
            crop = cut_crop(source.to(device), box, recipe)
        except CropError as error:
            raise InputError(f"zoom_boxes: row {row}: {error}") from error
        cells = pixels_to_cells(box, span.grid, (height, width), request.grid_boxes[span.index])
        crops.append(PlacedCrop(row, span, cells, crop))
    return crops


def _asking_columns(view: CoarseView, labels: Tensor) -> Tensor:
    """(B, 1) column of each row's last prompt token, in front of its answer."""
    columns = torch.arange(labels.shape[1], device=labels.device)
    first_answer = torch.where(labels != IGNORED, columns, labels.shape[1]).amin(1, keepdim=True)
    return torch.minimum(first_answer - 1, _last_valid(view.valid).to(labels.device)).clamp(min=0)


@torch.no_grad()
def _proposed_crops(model: ZoomModel, request: ZoomRequest, view: CoarseView, labels: Tensor) -> list[PlacedCrop]:
    """Crops that the region branch proposes, asked at each row's last prompt token."""
    return decide(model, request, run_to_branch(model, view), _asking_columns(view, labels))[1]


@torch.no_grad()
def _with_kept_tokens(
    model: ZoomModel, request: ZoomRequest, view: CoarseView, labels: Tensor, crops: list[PlacedCrop]
) -> list[PlacedCrop]:
    """Given crops with the coarse tokens that stay above layer K, which the region branch ranks."""
    options, rows = request.options, [placed.row for placed in crops]
    if options.keep_share >= 1 or not rows:
        return crops
    queries = _asking_columns(view, labels)[rows]
    maps_by_row = region_maps(model, options, run_to_branch(model, view), rows, request.spans, queries)
    kept = []
    for placed, maps in zip(crops, maps_by_row):
        heatmap = image_heatmap(model, options, maps, request.spans[placed.row].index(placed.span))
        cells = kept_cells(heatmap, placed.cells, options.keep_share, options.keep_margin)
        kept.append(replace(placed, kept=cells))
    return kept


def _fused_rows(
    model: ZoomModel, request: ZoomRequest, view: CoarseView, crops: list[PlacedCrop]
) -> tuple[list[FusedRow], VisualFeatures]:
    """Every row's fused sequence, plain where it has no crop, and the crops' features by row."""
    rows = [plain_row(row, view.valid[row], view.positions.row(row)) for row in range(len(view.input_ids))]
    empty = view.embeds[:0, 0]  # (0, D)
    levels = 0 if view.deepstack is None else len(view.deepstack.levels)
    features = VisualFeatures([empty] * len(rows), [[empty] * len(rows) for _ in range(levels)])
    if not crops:
        return rows, features
    encoded = encode_crops(model.vlm, [placed.crop for placed in crops], view.embeds.device)
    for slot, row in enumerate(plan_rows(model, request, view, crops)):
        rows[row.row] = row
        features.embeds[row.row] = encoded.embeds[slot]
        for level in range(levels):
            features.deepstack[level][row.row] = encoded.deepstack[level][slot]
    return rows, features


def _fused_labels(labels: Tensor, rows: list[FusedRow], length: int) -> Tensor:
    """(B, F) labels of the fused sequences; -100 on padding and on what was inserted."""
    fused = labels.new_full((len(rows), length), IGNORED)
    for row in rows:
        inserted = labels.new_full((row.block,), IGNORED)
        prompt = labels[row.row]
        fused[row.row, length - row.length :] = torch.cat([prompt[row.prefix], inserted, prompt[row.suffix]])
    return fused


def fused_language_pass(
    model: ZoomModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    vision: dict[str, Any],
    labels: Tensor,
    source_images: SourceInput | None,
    source_boxes: Any,
    zoom_boxes: Sequence[Any] | None,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Language loss and (B, F, vocabulary) logits over fused, left-padded sequences; arguments as in `forward`."""
    decoder = model.vlm.get_decoder()
    view = coarse_view(model, input_ids, attention_mask, vision)
    spans = prompt_images(model.config, input_ids, vision.get("image_grid_thw"))
    sources = collect_sources(source_images, spans)
    defaults = () if model.generation_config is None else (model.generation_config,)
    options = resolve_options({"zoom": "always"}, defaults, model.config, mrope=model.config.backbone.mrope)
    request = ZoomRequest(options, spans, sources, collect_grid_boxes(source_boxes, len(sources)))
    if zoom_boxes is None:
        crops = _proposed_crops(model, request, view, labels)
    else:
        crops = _given_crops(model, request, zoom_boxes, view.embeds.device)
        crops = _with_kept_tokens(model, request, view, labels, crops)
    rows, features = _fused_rows(model, request, view, crops)
    length = max(row.length for row in rows)
    embeds = pad_left(
        [fused_embeds(model, view, row, part, full=True) for row, part in zip(rows, features.embeds)], length
    )  # (B, F, D)
    mask = pad_left([row.mask for row in rows], length).to(embeds.device)
    positions = Positions.stack([row.positions for row in rows], length)
    layer_k, layers = model.config.branch_layer, len(decoder.layers)
    plans = [None] * layer_k + [upper_plan(rows, length, embeds.device)] * (layers - layer_k)
    hidden = run_layers(
        decoder,
        embeds,
        0,
        len(decoder.layers),
        mask=causal_mask(decoder, embeds, mask, None),
        position_embeddings=rotary(decoder, embeds, positions.for_decoder()),
        deepstack=fused_deepstack(view, rows, features, length, full=True),
        plans=plans,
    )
    logits = model.get_output_embeddings()(decoder.norm(hidden))
    vocabulary = model.config.get_text_config().vocab_size
    loss = model.vlm.loss_function(
        logits=logits,
        labels=_fused_labels(labels, rows, length),
        vocab_size=vocabulary,
        num_items_in_batch=num_items_in_batch,
    )
    return loss, logits
