"""The fused sequence: where a crop's tokens go, and at which positions (paper III-D).

Row layout:  prompt up to the zoomed image's end │ start marker, crop tokens, end marker │ rest of the prompt
Families without markers insert the crop tokens alone. Everything here is per row and without padding; tokens that the
attention mask hides inside a prompt stay where they are, and stay hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .regions_qzoom import Rectangle


@dataclass
class ImageSpan:
    """One image of one row: columns [start, end) of the row, and its (height, width) in tokens."""

    start: int
    end: int
    grid: tuple[int, int]
    index: int  # among all images of the batch


def image_spans(input_ids: Tensor, image_token_id: int, grids: list[tuple[int, int]]) -> list[list[ImageSpan]]:
    """Finds every row's images.

    Args:
        input_ids: (B, N).
        grids: (height, width) in tokens of every image of the batch, in order of appearance.

    Returns:
        One list of spans per row.

    Raises:
        ValueError: the rows' image tokens do not add up to the given images.
    """
    rows: list[list[ImageSpan]] = []
    index = 0
    for row, ids in enumerate((input_ids == image_token_id).cpu()):
        columns = ids.nonzero()[:, 0].tolist()
        spans: list[ImageSpan] = []
        used = 0
        while used < len(columns):
            place = f"row {row}, image {len(spans)}"
            if index == len(grids):
                raise ValueError(f"{place}: the prompt has image tokens left but only {len(grids)} images were given.")
            height, width = grids[index]
            run = columns[used : used + height * width]
            if len(run) < height * width or run[-1] - run[0] != len(run) - 1:
                raise ValueError(
                    f"{place}: an image of {height} × {width} tokens needs {height * width} image tokens in a row, "
                    f"the prompt has {len(run)} from column {run[0]} on. Were prompt and images processed together?"
                )
            spans.append(ImageSpan(run[0], run[-1] + 1, (height, width), index))
            used, index = used + len(run), index + 1
        rows.append(spans)
    if index != len(grids):
        raise ValueError(f"{len(grids)} images were given, the prompts hold the tokens of {index}.")
    return rows


@dataclass
class FusedRow:
    """One row's fused sequence as indices into its prompt and its inserted block.

    Attributes:
        row: index of the row in the batch.
        prefix: (P,) prompt columns up to the zoomed image's end; their states below layer K are reused.
        suffix: (S,) prompt columns after it; recomputed.
        block: number of inserted positions, markers included.
        crop: number of crop tokens among them.
        positions: (3, P + block + S) float32 for M-RoPE, (P + block + S,) float32 otherwise.
        mask: (P + block + S,) long, 0 where the prompt's mask hides a token.
    """

    row: int
    prefix: Tensor
    suffix: Tensor
    block: int
    crop: int
    positions: Tensor
    mask: Tensor

    @property
    def length(self) -> int:
        return len(self.prefix) + self.block + len(self.suffix)

    @property
    def has_markers(self) -> bool:
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
    return FusedRow(row, columns, columns[:0], 0, 0, positions[..., columns].float(), valid[columns].long())


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
        positions: (3, N) or (N,) positions of the prompt.
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
    margin = 1 if markers is not None and positions.ndim > 1 else 0
    block = crop + 2 * margin
    mask = torch.cat([valid[prefix], valid.new_ones(block), valid[suffix]]).long()
    positions = positions.float()
    last = prefix[valid[prefix] > 0][-1]  # a hidden token, the end marker included, takes no position
    start = float(positions[..., last].max()) + 1
    if positions.ndim == 1:
        inserted = start + torch.arange(crop, dtype=torch.float32, device=positions.device)
        fused = torch.cat([positions[prefix], inserted, positions[suffix] + crop])
        return FusedRow(row, prefix, suffix, block, crop, fused, mask)
    origin = float(positions[0, span.start])
    inserted = crop_positions(start + margin, origin, box, crop_grid, alignment).to(positions.device)
    advance = max(crop_grid) + 2 * margin
    if margin:
        before, after = (positions.new_full((3, 1), value) for value in (start, start + advance - 1))
        inserted = torch.cat([before, inserted, after], dim=1)
    fused = torch.cat([positions[:, prefix], inserted, positions[:, suffix] + advance], dim=1)
    return FusedRow(row, prefix, suffix, block, crop, fused, mask)


def pad_left(rows: list[Tensor], length: int, dim: int = 0) -> Tensor:
    """Stacks rows along a new first dimension, zeros in front of the shorter ones along `dim`."""
    padded = []
    for row in rows:
        shape = list(row.shape)
        shape[dim] = length - shape[dim]
        padded.append(torch.cat([row.new_zeros(shape), row], dim=dim))
    return torch.stack(padded)


def length_mask(lengths: list[int], length: int, device: torch.device) -> Tensor:
    """(B, length) long: ones at the right end, as many as a row is long."""
    columns = torch.arange(length, device=device)
    return (columns >= length - torch.tensor(lengths, device=device)[:, None]).long()


def stack_positions(rows: list[Tensor], length: int) -> Tensor:
    """Rows of (3, n) or (n,) positions, left-padded → (3, B, length) or (B, length)."""
    stacked = pad_left(rows, length, dim=rows[0].ndim - 1)
    return stacked.transpose(0, 1) if stacked.ndim == 3 else stacked
