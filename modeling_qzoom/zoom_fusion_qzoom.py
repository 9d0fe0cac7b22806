"""The fused sequence: where a crop's tokens go, and at which positions (paper III-D).

Row layout:  prompt up to the zoomed image's end │ start marker, crop tokens, end marker │ rest of the prompt
Families without markers insert the crop tokens alone. Everything here is per row and without padding; tokens that the
attention mask hides inside a prompt stay where they are, and stay hidden.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backbone_plans_qzoom import LayerPlan, subset_plan
from .prompt_qzoom import DeepStack, ImageSpan, VisualFeatures, marker_ids
from .rows_qzoom import pad_left
from .zoom_coarse_qzoom import CoarseView
from .zoom_crops_qzoom import Crop
from .zoom_model_qzoom import ZoomModel
from .zoom_regions_qzoom import Rectangle
from .zoom_request_qzoom import ZoomRequest


@dataclass(frozen=True)
class PlacedCrop:
    """A crop and where it belongs.

    Attributes:
        row: index of its row in the batch.
        span: the image that it was cut out of.
        cells: (x0, y0, x1, y1) of the region in cells of the image's token grid, end exclusive; may be fractional.
        crop: the crop.
        kept: (h, w) bool on the CPU, which of the image's coarse tokens stay above layer K; None for all.
    """

    row: int
    span: ImageSpan
    cells: Rectangle
    crop: Crop
    kept: Tensor | None = None


@dataclass
class FusedRow:
    """One row's fused sequence as indices into its prompt and its inserted block.

    Attributes:
        row: index of the row in the batch.
        prefix: (P,) prompt columns up to the zoomed image's end; their states below layer K are reused.
        suffix: (S,) prompt columns after it; recomputed.
        block: number of inserted positions, markers included.
        crop: number of crop tokens among them.
        positions: (A, P + block + S) float32.
        mask: (P + block + S,) long, 0 where the prompt's mask hides a token.
        upper: (U,) indices of the tokens that take part above layer K; None for all.
    """

    row: int
    prefix: Tensor
    suffix: Tensor
    block: int
    crop: int
    positions: Tensor
    mask: Tensor
    upper: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens in the fused sequence."""
        return len(self.prefix) + self.block + len(self.suffix)

    @property
    def has_markers(self) -> bool:
        """Whether marker tokens stand around the crop."""
        return self.block > self.crop


def _spread(origin: float, start: float, end: float, count: int) -> Tensor:
    """`count` coordinates from the first to the last of the cells [start, end)."""
    last = end - 1
    if last < start:
        start = last = (start + last) / 2
    return torch.linspace(origin + start, origin + last, count, dtype=torch.float32)


def crop_positions(
    first: float, image_origin: float, box: Rectangle, crop_grid: tuple[int, int], alignment: str
) -> Tensor:
    """(t, h, w) of a crop's tokens.

    Args:
        first: the position that a text token in place of the crop's first token would have; t of all its tokens.
        image_origin: position of the coarse image's first token.
        box: (x0, y0, x1, y1) in cells of the coarse grid, end exclusive: first and last tokens lie on the first and
            last *covered* cells. Fractional boxes are allowed; one narrower than a cell has a single coordinate.
        crop_grid: (height, width) in tokens.
        alignment: `"continuous"` places the tokens inside the coarse image, `"sequential"` after it.

    Returns:
        (3, height · width) float32.
    """
    height, width = crop_grid
    if alignment == "continuous":
        x0, y0, x1, y1 = box
        rows = _spread(image_origin, y0, y1, height)
        columns = _spread(image_origin, x0, x1, width)
    else:
        rows = first + torch.arange(height, dtype=torch.float32)
        columns = first + torch.arange(width, dtype=torch.float32)
    grid_h, grid_w = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(grid_h, first), grid_h, grid_w]).reshape(3, -1)


def _prompt_columns(valid: Tensor) -> Tensor:
    """Columns from the first token to the last, with the hidden ones between them."""
    columns = valid.nonzero()[:, 0]
    if not len(columns):
        return columns
    return torch.arange(int(columns[0]), int(columns[-1]) + 1, device=valid.device)


def plain_row(row: int, valid: Tensor, positions: Tensor) -> FusedRow:
    """A row without a crop: its own prompt, all of it prefix."""
    columns = _prompt_columns(valid)
    return FusedRow(row, columns, columns[:0], 0, 0, positions[:, columns].float(), valid[columns].long())


def fuse_row(
    row: int,
    input_ids: Tensor,
    valid: Tensor,
    positions: Tensor,
    span: ImageSpan,
    box: Rectangle,
    crop_grid: tuple[int, int],
    *,
    alignment: str,
    markers: tuple[int, int] | None,
) -> FusedRow:
    """Plans one row's fused sequence.

    Args:
        row: index of the row in the batch.
        input_ids, valid: (N,) ids and attention mask of the prompt; a token of the zoomed image, or one before it,
            must be visible.
        positions: (A, N) positions of the prompt.
        span: the zoomed image.
        box: (x0, y0, x1, y1) in cells of its grid.
        crop_grid: (height, width) of the crop in tokens.
        alignment: `"continuous"` or `"sequential"`.
        markers: ids of the tokens that stand before and after an image, None in families without them.
    """
    columns = _prompt_columns(valid)
    end = span.end
    if markers is not None and end < len(input_ids) and int(input_ids[end]) == markers[1]:
        end += 1
    prefix, suffix = columns[columns < end], columns[columns >= end]
    crop = crop_grid[0] * crop_grid[1]
    has_grid = len(positions) > 1
    margin = 1 if markers is not None and has_grid else 0
    block = crop + 2 * margin
    mask = torch.cat([valid[prefix], valid.new_ones(block), valid[suffix]]).long()
    positions = positions.float()
    last = prefix[valid[prefix] > 0][-1]  # a hidden token, the end marker included, takes no position
    start = float(positions[:, last].max()) + 1
    if not has_grid:
        inserted = start + torch.arange(crop, dtype=torch.float32, device=positions.device)[None]
        fused = torch.cat([positions[:, prefix], inserted, positions[:, suffix] + crop], dim=1)
        return FusedRow(row, prefix, suffix, block, crop, fused, mask)
    origin = float(positions[0, span.start])
    inserted = crop_positions(start + margin, origin, box, crop_grid, alignment).to(positions.device)
    advance = max(crop_grid) + 2 * margin
    if margin:
        before, after = (positions.new_full((3, 1), value) for value in (start, start + advance - 1))
        inserted = torch.cat([before, inserted, after], dim=1)
    fused = torch.cat([positions[:, prefix], inserted, positions[:, suffix] + advance], dim=1)
    return FusedRow(row, prefix, suffix, block, crop, fused, mask)


def plan_rows(model: ZoomModel, request: ZoomRequest, view: CoarseView, crops: list[PlacedCrop]) -> list[FusedRow]:
    """The fused sequence of every zooming row."""
    default = "continuous" if model.config.backbone.mrope else "sequential"
    alignment = request.options.position_alignment or default
    markers = marker_ids(model.config)
    rows = [
        fuse_row(
            placed.row,
            view.input_ids[placed.row],
            view.valid[placed.row],
            view.positions.row(placed.row),
            placed.span,
            placed.cells,
            placed.crop.token_grid,
            alignment=alignment,
            markers=markers,
        )
        for placed in crops
    ]
    return [replace(row, upper=_upper_tokens(row, placed)) for row, placed in zip(rows, crops)]


def _upper_tokens(row: FusedRow, placed: PlacedCrop) -> Tensor | None:
    """(U,) indices of a fused row's tokens without the coarse ones that are not kept; None for all."""
    if placed.kept is None:
        return None
    dropped = torch.arange(placed.span.start, placed.span.end)[~placed.kept.flatten()]
    present = torch.ones(row.length, dtype=torch.bool)
    present[: len(row.prefix)] = ~torch.isin(row.prefix.cpu(), dropped)
    return present.nonzero()[:, 0].to(row.prefix.device)


def upper_plan(rows: list[FusedRow], length: int, device: torch.device) -> LayerPlan | None:
    """The plan of layers above K over rows that are left-padded to `length`; None where all tokens take part."""
    if all(row.upper is None for row in rows):
        return None
    parts = [torch.arange(row.length) if row.upper is None else row.upper.cpu() for row in rows]
    count = max(len(part) for part in parts)
    columns = pad_left([part + length - row.length for part, row in zip(parts, rows)], count)
    mask = pad_left([row.mask.cpu()[part] for part, row in zip(parts, rows)], count)
    return subset_plan(columns.to(device), mask.to(device))


def _inserted_embeds(model: ZoomModel, row: FusedRow, crop_embeds: Tensor, like: Tensor) -> Tensor:
    """(block, D): the crop's tokens between their markers."""
    crop_embeds = crop_embeds.to(like.device, like.dtype)
    if not row.has_markers:
        return crop_embeds
    ids = torch.tensor([marker_ids(model.config)], device=like.device)
    before, after = model.vlm.get_input_embeddings()(ids)[0].to(like.device)
    return torch.cat([before[None], crop_embeds, after[None]])


def fused_embeds(model: ZoomModel, view: CoarseView, row: FusedRow, crop_embeds: Tensor, *, full: bool) -> Tensor:
    """(n, D) inputs of layer 0 for the inserted block and the suffix; `full` puts the prefix in front."""
    inserted = _inserted_embeds(model, row, crop_embeds, view.embeds)
    prefix = [view.embeds[row.row, row.prefix]] if full else []
    return torch.cat([*prefix, inserted, view.embeds[row.row, row.suffix]])


def fused_deepstack(
    view: CoarseView, rows: list[FusedRow], features: VisualFeatures, length: int, *, full: bool
) -> DeepStack | None:
    """DeepStack features of fused rows.

    Args:
        features: the crops, one per row (empty tensors for a row without).
        length: rows are left-padded to it.
        full: include the prefix.
    """
    if view.deepstack is None:
        return None
    coarse_mask = view.deepstack.mask
    coarse_index = (coarse_mask.flatten().cumsum(0) - 1).view_as(coarse_mask)  # row of a level's tensor by token
    masks, picks = [], []
    for row in rows:
        prompt_mask, prompt_index = coarse_mask[row.row], coarse_index[row.row]
        before = row.prefix if full else row.prefix[:0]
        inserted = torch.zeros(row.block, dtype=torch.bool, device=coarse_mask.device)
        margin = (row.block - row.crop) // 2
        inserted[margin : margin + row.crop] = True
        masks.append(torch.cat([prompt_mask[before], inserted, prompt_mask[row.suffix]]))
        picks.append(tuple(prompt_index[part[prompt_mask[part]]] for part in (before, row.suffix)))
    levels = []
    for coarse, crop_level in zip(view.deepstack.levels, features.deepstack):
        parts = []
        for (before, after), inserted in zip(picks, crop_level):
            parts += [coarse[before.to(coarse.device)], inserted.to(coarse), coarse[after.to(coarse.device)]]
        levels.append(torch.cat(parts))
    return DeepStack(levels, pad_left(masks, length))
