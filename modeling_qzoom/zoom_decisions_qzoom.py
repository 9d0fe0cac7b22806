"""Per row of a batch: does the coarse view suffice, and if not, which region of which image is cropped?"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from .backbone_adapters_qzoom import run_rows
from .backbone_layers_qzoom import Mask, causal_mask, mask_behind
from .backbone_projections_qzoom import Rotary
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import CropError
from .prompt_qzoom import ImageSpan
from .report_qzoom import ZoomReport
from .rows_qzoom import pick
from .zoom_branch_plans_qzoom import gate_plans, region_plans
from .zoom_coarse_qzoom import CoarseView
from .zoom_crops_qzoom import crop_recipe, cut_crop
from .zoom_foveation_qzoom import kept_cells
from .zoom_fusion_qzoom import PlacedCrop
from .zoom_model_qzoom import ZoomModel
from .zoom_options_qzoom import ZoomOptions
from .zoom_page_reading_qzoom import branch_past, with_gate, with_region
from .zoom_regions_qzoom import box_to_pixels, find_region, grid_sigma, region_heatmap
from .zoom_request_qzoom import ZoomRequest


def branch_inputs(decoder: PreTrainedModel, view: CoarseView, rows: list[int]) -> tuple[Tensor, Mask, Rotary]:
    """What a branch needs of some rows: hidden states and mask of the columns that run, rotary embeddings of all."""
    if rows == list(range(len(view.hidden))):
        return view.hidden[:, view.start :], view.mask, view.position_embeddings
    hidden, valid = pick(view.hidden, rows), pick(view.valid, rows)
    cos, sin = (pick(part, rows) for part in view.position_embeddings)
    if view.known is None:
        return hidden, causal_mask(decoder, hidden, valid, None), (cos, sin)
    hidden = hidden[:, view.start :]
    return hidden, mask_behind(decoder.config, hidden, valid, view.start), (cos, sin)


def last_columns(view: CoarseView, rows: list[int]) -> Tensor:
    """(rows, 1) column of the last prompt token; prompts are padded on the left."""
    return torch.full((len(rows), 1), view.hidden.shape[1] - 1, device=view.hidden.device)


def first_columns(view: CoarseView, rows: list[int]) -> Tensor:
    """(rows, 1) column of the first prompt token."""
    return view.valid[rows].argmax(dim=1, keepdim=True).to(view.hidden.device)


def gate_logits(
    model: ZoomModel, options: ZoomOptions, view: CoarseView, rows: list[int], query_columns: Tensor | None = None
) -> Tensor:
    """(rows,) logits of the gate, which the model must have.

    Args:
        options: which tokens its layers update.
        query_columns: (rows, 1); the last prompt token by default, and always where columns are known.
    """
    hidden, mask, position_embeddings = branch_inputs(model.vlm.get_decoder(), view, rows)
    queries = last_columns(view, rows) - view.start if query_columns is None else query_columns
    gate = model.zoom.gate
    assert gate is not None
    ids, valid = (pick(part, rows)[:, view.start :] for part in (view.input_ids, view.valid))
    plans = gate_plans(model.config, options, ids, valid, query_columns)
    past = None
    if view.known is not None:
        known = with_gate(model, options.gate_branch, view.known.pick(rows))
        past = branch_past(gate, known, lambda page: page.gate, hidden.device)
    return gate(hidden, mask, position_embeddings, queries, plans, past)


@dataclass
class RegionMaps:
    """Region logits of one row: per image (queries, h, w), and those of the first token's query (h, w)."""

    logits: list[Tensor]
    first_token_logits: list[Tensor]


def region_maps(
    model: ZoomModel,
    options: ZoomOptions,
    view: CoarseView,
    rows: list[int],
    spans: list[list[ImageSpan]],
    query_columns: Tensor | None = None,
) -> list[RegionMaps]:
    """Region logits of every image of some rows.

    Args:
        options: which tokens the branch's layers update.
        rows: rows with at least one image.
        spans: the batch's images by row.
        query_columns: (rows, Q) columns of the asking tokens; the last prompt token by default.
    """
    columns = [torch.cat([torch.arange(span.start, span.end) for span in spans[row]]) for row in rows]
    longest = max(len(row) for row in columns)
    keys = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in columns])
    queries = last_columns(view, rows) if query_columns is None else query_columns.to(view.hidden.device)
    queries = torch.cat([first_columns(view, rows), queries], dim=1)  # (rows, 1 + Q)
    hidden, mask, position_embeddings = branch_inputs(model.vlm.get_decoder(), view, rows)
    asking = None if query_columns is None else query_columns.to(view.hidden.device)
    ids, valid = (pick(part, rows)[:, view.start :] for part in (view.input_ids, view.valid))
    plans, past = region_plans(model.config, options, ids, valid, asking), None
    if view.known is not None:
        known = with_region(model, options.region_branch, view.known.pick(rows))
        past = branch_past(model.zoom.region, known, lambda page: page.region, hidden.device)
    logits, first_head = model.zoom.region(
        hidden, mask, position_embeddings, queries, keys.to(view.hidden.device), plans, past
    )  # each (rows, 1 + Q, V)
    maps = []
    for index, row in enumerate(rows):
        sizes = [span.grid[0] * span.grid[1] for span in spans[row]]
        by_image = logits[index, 1:, : sum(sizes)].split(sizes, dim=1)
        first = first_head[index, 0, : sum(sizes)].split(sizes)
        maps.append(
            RegionMaps(
                [part.unflatten(1, span.grid) for part, span in zip(by_image, spans[row])],
                [part.unflatten(0, span.grid) for part, span in zip(first, spans[row])],
            )
        )
    return maps


def _visual_tokens(config: QZoomConfig, input_ids: Tensor) -> tuple[list[int], list[bool]]:
    """Per row: number of visual tokens, and whether some belong to a video."""
    images = (input_ids == config.image_token_id).sum(1)
    videos = (input_ids == config.video_token_id).sum(1) if config.video_token_id is not None else 0 * images
    return (images + videos).tolist(), (videos > 0).tolist()


def plain_reports(config: QZoomConfig, input_ids: Tensor, reason: str) -> list[ZoomReport]:
    """Reports of rows that nobody considers zooming: `reason`, or what else rules them out."""
    has_images = (input_ids == config.image_token_id).any(1).tolist()
    reports = []
    for tokens, has_video, has_image in zip(*_visual_tokens(config, input_ids), has_images):
        row_reason = "video" if has_video else reason if has_image else "no_image"
        reports.append(ZoomReport(reason=row_reason, coarse_tokens=tokens, has_gate=config.has_gate))
    return reports


def decide(
    model: ZoomModel, request: ZoomRequest, view: CoarseView, query_columns: Tensor | None = None
) -> tuple[list[ZoomReport], list[PlacedCrop]]:
    """Steps 2 and 4 to 5: gate, region, crop.

    Args:
        query_columns: (B, 1) column of each row's last prompt token; the last column by default.

    Returns:
        One report per row, and the crops of the rows that zoom.
    """
    options = request.options
    # without a gate, auto means always
    asks_gate = options.zoom == "auto" and model.zoom.gate is not None
    reason = "off" if options.zoom == "never" else "gate_open" if asks_gate else "forced"
    reports = plain_reports(model.config, view.input_ids, reason)
    rows = [row for row, report in enumerate(reports) if report.reason in ("forced", "gate_open")]
    if rows and asks_gate:
        queries = None if query_columns is None else query_columns[rows]
        with run_rows(request.adapters, rows):
            logits = gate_logits(model, options, view, rows, queries)
        for row, probability in zip(rows, logits.sigmoid().tolist()):
            if math.isnan(probability):  # compares as neither above nor below a threshold
                reports[row].reason = "gate_nan"
                continue
            reports[row].gate_probability = probability
            if probability < options.gate_threshold:
                reports[row].reason = "gate_closed"
        rows = [row for row in rows if reports[row].reason == "gate_open"]
    if not rows:
        return reports, []
    crops = []
    queries = None if query_columns is None else query_columns[rows]
    with run_rows(request.adapters, rows):
        maps_by_row = region_maps(model, options, view, rows, request.spans, queries)
    for row, maps in zip(rows, maps_by_row):
        crop = _crop_row(model, request, row, maps, reports[row], view.embeds.device)
        if crop is not None:
            crops.append(crop)
    return reports, crops


def image_heatmap(model: ZoomModel, options: ZoomOptions, maps: RegionMaps, image: int) -> Tensor:
    """(h, w) heat map of one of a row's images, asked by its first query."""
    artifact_rule = model.config.backbone.artifact_rule
    logits, first = maps.logits[image][0], maps.first_token_logits[image]
    if options.region_blur == "fixed":
        return region_heatmap(logits, first, artifact_rule)
    return region_heatmap(logits, first, artifact_rule, grid_sigma(logits.numel()))


def _crop_row(
    model: ZoomModel, request: ZoomRequest, row: int, maps: RegionMaps, report: ZoomReport, device: torch.device
) -> PlacedCrop | None:
    """Picks the image with the highest peak, boxes its region and cuts it out; records all of it in the report."""
    spec, options = model.config.backbone, request.options
    heatmaps = [image_heatmap(model, options, maps, image) for image in range(len(maps.logits))]
    if any(bool(heatmap.isnan().any()) for heatmap in heatmaps):
        report.reason = "map_nan"
        return None
    image = max(range(len(heatmaps)), key=lambda index: float(heatmaps[index].max()))
    span = request.spans[row][image]
    source, grid_box = request.sources[span.index], request.grid_boxes[span.index]
    report.image_index, report.grid_box = image, grid_box
    heatmap = heatmaps[image].cpu()
    report.region_logits, report.heatmap = maps.logits[image][0].float().cpu(), heatmap
    cells, report.empty_rule = find_region(heatmap, options)
    if cells is None:
        report.reason = "empty_map"
        return None
    height, width = source.shape[1:]
    recipe = crop_recipe(model.config, options)
    box = box_to_pixels(
        cells, span.grid, (height, width), spec.min_box_side, grid_box, cell_side=recipe.grid.token_side
    )
    if box is None:
        report.reason = "crop_failed"
        return None
    report.box = box
    try:
        crop = cut_crop(source.to(device), box, recipe)
    except CropError:
        report.reason = "crop_failed"
        return None
    report.zoomed = True
    report.crop_tokens = crop.tokens
    kept = kept_cells(heatmaps[image], cells, options.keep_share, options.keep_margin)
    return PlacedCrop(row, span, cells, crop, kept)
