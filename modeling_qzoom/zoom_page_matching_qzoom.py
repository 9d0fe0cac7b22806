"""Which rows of a call begin alike, and whether a prompt begins with a page that was read earlier.

Images count as the same where their pixel values are. Within a call ids are compared first, then a few pixels, then
all of them; with an earlier page, digests.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backbones_qzoom import token_grid_of
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import InputError, UnsupportedError
from .messages_qzoom import described
from .prompt_qzoom import ImageSpan, marker_ids
from .zoom_model_qzoom import ZoomModel
from .zoom_pages_qzoom import Page


# of an image's values, compared before all of them are
_SAMPLES = 64
_READ_AGAIN = "Read the page again (model.read_page), or leave page out."


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call as far as they decide where rows begin alike.

    Attributes:
        input_ids, valid: (B, N), on the CPU.
        spans: per row, where its images are.
        pixels: pixel values by image; None where the call gives none.
        end_marker: id of the token behind an image; None in families without one.
        videos: whether a prompt holds a video.
    """

    input_ids: Tensor
    valid: Tensor
    spans: list[list[ImageSpan]]
    pixels: list[Tensor] | None
    end_marker: int | None
    videos: bool

    @classmethod
    def of(
        cls,
        config: QZoomConfig,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        spans: list[list[ImageSpan]],
        vision: dict[str, Any],
    ) -> "Prompts":
        """From the checked inputs of a call."""
        pixels, grid = vision.get("pixel_values"), token_grid_of(config.vlm_config)
        markers = marker_ids(config)
        return cls(
            input_ids.cpu(),
            torch.ones_like(input_ids, device="cpu") if attention_mask is None else attention_mask.long().cpu(),
            spans,
            None if pixels is None else grid.image_pixels(pixels, vision.get("image_grid_thw")),
            None if markers is None else markers[1],
            config.video_token_id is not None and bool((input_ids == config.video_token_id).any()),
        )

    def first(self, row: int) -> int:
        """Column of a row's first token."""
        return int(self.valid[row].argmax())

    def cut(self, row: int, images: int) -> int:
        """Column behind the first so many images of a row, and behind the marker of the last of them."""
        end = self.spans[row][images - 1].end
        has_marker = end < self.input_ids.shape[1] and int(self.input_ids[row, end]) == self.end_marker
        return end + has_marker

    def beginning(self, row: int, images: int) -> tuple[int, ...] | None:
        """Ids up to the cut; None where the mask hides one of them."""
        columns = slice(self.first(row), self.cut(row, images))
        return tuple(self.input_ids[row, columns].tolist()) if bool(self.valid[row, columns].all()) else None


@dataclass(frozen=True)
class SharedBeginning:
    """Rows of one call that begin alike: the tokens up to the end of their first `images` images."""

    rows: tuple[int, ...]
    images: int
    tokens: int


def shared_beginnings(prompts: Prompts, rows: Sequence[int]) -> tuple[list[SharedBeginning], dict[int, int]]:
    """The rows that begin alike, in groups that save most.

    Args:
        rows: the rows that may be grouped.

    Returns:
        The groups, and for images that need not be encoded the equal image (their indices in the batch).
    """
    if prompts.pixels is None or prompts.videos or len(rows) < 2:
        return [], {}
    same: dict[int, int] = {}
    _, groups = _best_groups(prompts, list(rows), 0)
    for group in groups:
        for image in range(group.images):
            read, *others = (prompts.spans[row][image].index for row in group.rows)
            same |= dict.fromkeys(others, read)
    return groups, same


def _best_groups(prompts: Prompts, rows: list[int], depth: int) -> tuple[int, list[SharedBeginning]]:
    """Groups of rows that agree on more than their first `depth` images, and how many tokens need not run again."""
    by_ids: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        ids = prompts.beginning(row, depth + 1) if len(prompts.spans[row]) > depth else None
        if ids is not None:
            by_ids.setdefault((ids, prompts.spans[row][depth].grid), []).append(row)
    saved, groups = 0, list[SharedBeginning]()
    for (ids, _), alike in by_ids.items():
        for same in _with_equal_images(prompts, alike, depth):
            if len(same) < 2:
                continue
            here = (len(same) - 1) * len(ids)
            deeper, parts = _best_groups(prompts, same, depth + 1)
            if deeper < here:
                deeper, parts = here, [SharedBeginning(tuple(same), depth + 1, len(ids))]
            saved, groups = saved + deeper, groups + parts
    return saved, groups


def _with_equal_images(prompts: Prompts, rows: list[int], image: int) -> list[list[int]]:
    """Rows by the content of one of their images."""
    if len(rows) < 2 or prompts.pixels is None:
        return [rows]
    pixels = [prompts.pixels[prompts.spans[row][image].index].flatten() for row in rows]
    samples = torch.stack([values[:: max(len(values) // _SAMPLES, 1)] for values in pixels]).cpu()
    groups: list[list[int]] = []  # positions in `rows`
    for number, (values, sample) in enumerate(zip(pixels, samples)):
        for group in groups:
            if torch.equal(samples[group[0]], sample) and torch.equal(pixels[group[0]], values):
                group.append(number)
                break
        else:
            groups.append([number])
    return [[rows[number] for number in group] for group in groups]


def digest(pixels: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> bytes:
    """What tells an image from others: its pixel values, in the precision in which they are seen, and its grid."""
    values = pixels.detach().to(dtype).cpu().contiguous()
    content = hashlib.blake2b(str(grid).encode(), digest_size=16)
    content.update(values.view(torch.uint8).numpy().data)
    return content.digest()


def pages_by_row(model: ZoomModel, page: Any, prompts: Prompts) -> list[Page | None]:
    """The page of every row.

    Args:
        page: what a call gives: one page for all rows, or a list with one, or None, for every row.

    Raises:
        InputError: no pages, another number of them than there are rows, a page of another model or state, or a
            prompt that does not begin with its page.
        UnsupportedError: a prompt with a video.
    """
    count = len(prompts.input_ids)
    pages = list(page) if isinstance(page, (list, tuple)) else [page] * count
    for given in pages:
        if given is not None and not isinstance(given, Page):
            raise InputError(f"page must be what model.read_page returned, or a list of it, got {described(given)}.")
    if len(pages) != count:
        raise InputError(f"page holds {len(pages)} pages, the batch {count} rows; give one, or one (or None) per row.")
    if prompts.videos:
        raise UnsupportedError("page: prompts with videos cannot continue from a page; leave page out.")
    for given in {id(given): given for given in pages if given is not None}.values():
        difference = None if given.read_by is None else given.read_by.difference(model)
        if difference is not None:
            raise InputError(f"the page was read by {difference}. {_READ_AGAIN}")
    digests: dict[int, bytes] = {}
    for row, given in enumerate(pages):
        if given is not None:
            _check_beginning(model, given, prompts, row, digests)
    return pages


def _check_beginning(model: ZoomModel, page: Page, prompts: Prompts, row: int, digests: dict[int, bytes]) -> None:
    """Compares a row's first tokens and images with a page.

    Raises:
        InputError: they differ.
    """
    ids, images = page.beginning.input_ids, len(page.digests)
    first = prompts.first(row)
    columns = slice(first, first + len(ids))
    mine = prompts.input_ids[row, columns]
    if not bool(prompts.valid[row, columns].all()):
        raise InputError(f"row {row} does not start with the page: its mask hides some of these tokens. {_READ_AGAIN}")
    if len(mine) < len(ids) or not torch.equal(mine, ids.to(mine.device)):
        agreeing = int((mine == ids[: len(mine)].to(mine.device)).long().cumprod(0).sum())
        raise InputError(
            f"row {row} does not start with the page: of its {len(ids)} tokens, the first {agreeing} agree. Put the "
            "image where it stood when the page was read, with the same text in front and the same budget."
        )
    if prompts.pixels is None:
        raise InputError(
            "page: pixel_values are missing, by which the page's images are recognised; pass what the processor "
            "returned."
        )
    dtype = page.hidden.dtype
    for image, expected in enumerate(page.digests):
        span = prompts.spans[row][image]
        if span.index not in digests:
            digests[span.index] = digest(prompts.pixels[span.index], span.grid, dtype)
        if digests[span.index] != expected:
            which = f"image {image}" if images > 1 else "its image"
            raise InputError(
                f"row {row} does not start with the page: {which} has other pixel values than the one that was read, "
                f"though as many tokens. {_READ_AGAIN}"
            )
