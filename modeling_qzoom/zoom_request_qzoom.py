"""One call's zoom request: checked inputs that travel through `generate` as a single object."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .backbone_adapters_qzoom import RowAdapters
from .backbones_qzoom import token_grid_of
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import InputError
from .messages_qzoom import shown
from .processing_images_qzoom import ImageSlot, load_rgb, source_tensor
from .prompt_qzoom import ImageSpan, VisualFeatures
from .report_qzoom import ZoomReport
from .rows_qzoom import pick
from .source_images_qzoom import SourceInput, as_uint8, unpack_images
from .zoom_options_qzoom import ZoomOptions
from .zoom_page_matching_qzoom import SharedBeginning
from .zoom_pages_qzoom import Page
from .zoom_regions_qzoom import Rectangle


_WAY_OUT = (
    "Process images and text with QZoomProcessor, which adds source_images. Without zooming they are not needed: "
    "zoom='never' in `generate`, no zoom_boxes in `forward`."
)


@dataclass(frozen=True)
class ZoomRequest:
    """Everything that the zooming prefill needs besides the VLM's own inputs, checked before anything runs.

    Attributes:
        options: the resolved options.
        spans: per row, where its images are.
        sources: (3, H, W) uint8 source of every image, in order of appearance.
        grid_boxes: per image, the rectangle of source pixels under its grid; None for the whole image.
        expand_size: how often `generate` repeats each row (beams, return sequences).
        adapters: what peft gives the layers of this call by row, None for nothing.
        makes_cache: whether `generate` makes the cache of this call, which may then be replaced by a longer one.
        pages: per row, the page that it continues from; None where it has none.
        shared: groups of the other rows that begin alike.
        same_images: for images that need not be encoded, the equal one, by index.
        encoder_outputs: encoded images and videos of the distinct rows.
        reports: an empty list, which the prefill fills with one report per distinct row; copies share it.
    """

    options: ZoomOptions
    spans: list[list[ImageSpan]]
    sources: list[Tensor]
    grid_boxes: list[Rectangle | None]
    adapters: RowAdapters | None = None
    expand_size: int = 1
    makes_cache: bool = True
    pages: list[Page | None] = field(default_factory=list)
    shared: list[SharedBeginning] = field(default_factory=list)
    same_images: dict[int, int] = field(default_factory=dict)
    encoder_outputs: dict[str, VisualFeatures] = field(default_factory=dict)
    reports: list[ZoomReport] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether no row may zoom, or knows any of its tokens."""
        return self.options.zoom == "never" and not any(self.pages)

    def pick(self, rows: list[int]) -> "ZoomRequest":
        """The part of the request that some rows are concerned with, in a call without videos or adapters by row."""
        spans = [self.spans[row] for row in rows]
        images = [span.index for row in spans for span in row]
        features = {"image": self.encoder_outputs["image"].pick(images)} if images else {}
        return replace(self, spans=spans, encoder_outputs=features)

    def unread_images(self) -> list[int] | None:
        """Indices of the images that the vision tower has to see; None for all of them."""
        known = set(self.same_images) | set(self._images_of_pages())
        images = sum(len(row) for row in self.spans)
        return [image for image in range(images) if image not in known] if known else None

    def with_features(self, encoded: dict[str, VisualFeatures]) -> "ZoomRequest":
        """The request with the features of all images.

        Args:
            encoded: what was encoded: by kind, images (of `unread_images`) and videos.
        """
        unread = self.unread_images()
        if unread is None:
            return replace(self, encoder_outputs=encoded)
        found = self._images_of_pages()
        if unread:
            found |= {image: encoded["image"].pick([place]) for place, image in enumerate(unread)}
        found |= {image: found[equal] for image, equal in self.same_images.items()}
        return replace(self, encoder_outputs={"image": VisualFeatures.join([found[image] for image in sorted(found)])})

    def _images_of_pages(self) -> dict[int, VisualFeatures]:
        """Features of the images that stand on the rows' pages, by index."""
        return {
            self.spans[row][image].index: page.beginning.images.pick([image])
            for row, page in enumerate(self.pages)
            if page is not None
            for image in range(len(page.digests))
        }


def unread_inputs(config: QZoomConfig, request: ZoomRequest, vision: dict[str, Any]) -> dict[str, Any]:
    """The visual inputs of a call without those that nobody needs to look at again.

    Args:
        vision: keyword arguments of a call by name.
    """
    unread, pixels = request.unread_images(), vision.get("pixel_values")
    if unread is None or pixels is None:
        return vision
    kept = {name: value for name, value in vision.items() if name not in ("pixel_values", "image_grid_thw")}
    if not unread:
        return kept
    grids = vision.get("image_grid_thw")
    parts = token_grid_of(config.vlm_config).image_pixels(pixels, grids)
    kept["pixel_values"] = torch.cat([parts[image] for image in unread])
    return kept if grids is None else {**kept, "image_grid_thw": pick(grids, unread)}


def as_source(slot: ImageSlot) -> Tensor:
    """A PIL image (upright and RGB, as the processor reads it) or integers (3, H, W) in 0..255 as (3, H, W) uint8.

    Raises:
        InputError: anything else; the message names the image's place.
    """
    image = slot.image
    if hasattr(image, "convert"):
        return source_tensor(load_rgb(slot))
    source = as_uint8(image)
    if source is None and isinstance(image, Tensor):
        raise InputError(
            f"source_images: {slot} is a {image.dtype} tensor of shape {tuple(image.shape)}; expected uint8 (3, H, "
            "W), as QZoomProcessor makes it (other integers in 0..255 will do), or a PIL image."
        )
    if source is None:
        shape = f" Its shape is {image.shape}, its type {image.dtype}." if hasattr(image, "shape") else ""
        raise InputError(
            f"source_images: {slot} is a {type(image).__name__}; expected a PIL image or a uint8 tensor (3, H, W), or "
            f"an array or nested lists of that shape with integers in 0..255.{shape}"
        )
    return source


def _place(index: int, expected: list[int]) -> tuple[int, int]:
    """(row, image in the row) of a flat image index."""
    for row, count in enumerate(expected):
        if index < count:
            return row, index
        index -= count
    raise IndexError(index)


def _is_nested(images: Sequence[Any]) -> bool:
    return len(images) > 0 and all(image is None or isinstance(image, (list, tuple)) for image in images)


def _fits(size: tuple[int, int], grid: tuple[int, int]) -> bool:
    """Whether an image of (height, width) pixels, resized in its aspect ratio, can have a grid of whole tokens."""
    # image processors round both sides to the nearest token, both down (to one at least) or both up
    for below, above in ((0.5, 0.5), (0.0, 1.0), (1.0, 0.0)):
        low = max((side - below if side > 1 else 0.0) / pixels for side, pixels in zip(grid, size))
        high = min((side + above) / pixels for side, pixels in zip(grid, size))
        if low <= high:
            return True
    return False


def _check_orientation(source: Tensor, place: str, grid: tuple[int, int]) -> None:
    """Checks that a source image is not given lying on its side.

    Raises:
        InputError: the source fits the grid only on its side.
    """
    height, width = source.shape[1:]
    if not _fits((height, width), grid) and _fits((width, height), grid):
        raise InputError(
            f"source_images: {place} is {height} × {width} pixels (height × width), but its token grid is {grid[0]} × "
            f"{grid[1]}, which fits it only on its side. Are the sources in the order of the images, h before w in "
            "image_grid_thw, and both views upright?"
        )


def collect_sources(source_images: SourceInput | None, spans: list[list[ImageSpan]]) -> list[Tensor]:
    """Flattens and checks the source images of a batch.

    Args:
        source_images: one image, a flat list, or one list (or None) per row; PIL images, or tensors, arrays or nested
            lists (3, H, W) of integers in 0..255. A (n, 3, H, W) tensor counts as a flat list.

    Raises:
        InputError: no sources, a wrong count (naming row and image), an image of the wrong kind, or one that lies on
            its side.
    """
    expected = [len(row) for row in spans]
    if source_images is None and not sum(expected):
        return []
    if source_images is None:
        row = next(index for index, count in enumerate(expected) if count)
        raise InputError(f"row {row} holds image tokens but source_images is missing. {_WAY_OUT}")
    unpacked = unpack_images(source_images)
    images = unpacked if isinstance(unpacked, list) else [unpacked]
    if _is_nested(images):
        if len(images) != len(expected):
            raise InputError(f"source_images has {len(images)} rows, the batch {len(expected)}.")
        for row, (given, count) in enumerate(zip(images, expected)):
            if len(given or []) != count:
                raise InputError(
                    f"source_images: row {row} has {len(given or [])} images, its prompt has {count}. {_WAY_OUT}"
                )
        images = [image for row in images for image in row or []]
    if len(images) < sum(expected):
        row, image = _place(len(images), expected)
        raise InputError(
            f"source_images has {len(images)} images, the prompts have {sum(expected)}; the first one missing is row "
            f"{row}, image {image}. {_WAY_OUT}"
        )
    if len(images) > sum(expected):
        raise InputError(
            f"source_images has {len(images)} images, the prompts have only {sum(expected)}; image {sum(expected)} "
            f"has no place in row {len(expected) - 1}. {_WAY_OUT}"
        )
    slots = [ImageSlot(image, index, *_place(index, expected)) for index, image in enumerate(images)]
    sources = [as_source(slot) for slot in slots]
    for slot, source, span in zip(slots, sources, [span for row in spans for span in row]):
        _check_orientation(source, str(slot), span.grid)
    return sources


def _flat_numbers(nested: Any) -> list[float]:
    """The numbers of a tensor or array, or of lists and tensors nested to any depth, in order; None counts as nothing.

    Raises:
        InputError: something in it is no number.
    """
    nested = nested.tolist() if hasattr(nested, "tolist") else nested
    if isinstance(nested, (list, tuple)):
        return [number for item in nested for number in _flat_numbers(item)]
    if nested is None:
        return []
    if not isinstance(nested, Real) or isinstance(nested, bool) or not math.isfinite(nested):
        raise InputError(
            f"source_boxes must hold finite numbers (x0, y0, x1, y1), it holds {shown(str(nested))}. Pass what "
            "QZoomProcessor returned."
        )
    return [float(nested)]


def collect_grid_boxes(source_boxes: Any, count: int) -> list[Rectangle | None]:
    """Per image, the rectangle (x0, y0, x1, y1) of source pixels under its token grid.

    Args:
        source_boxes: (count, 4), flat or nested by row (with None or nothing for rows without images), or None where
            grids cover whole images.

    Raises:
        InputError: not one rectangle per image, something that is no finite number, or a rectangle without area.
    """
    if source_boxes is None:
        return [None] * count
    numbers = _flat_numbers(source_boxes)
    if len(numbers) != 4 * count:
        raise InputError(
            f"source_boxes holds {len(numbers)} numbers; expected 4 (x0, y0, x1, y1) for each of the prompts' {count} "
            "images. Pass what QZoomProcessor returned."
        )
    boxes: list[Rectangle | None] = []
    for index in range(count):
        x0, y0, x1, y1 = numbers[4 * index : 4 * index + 4]
        if not (x1 > x0 and y1 > y0):
            raise InputError(f"source_boxes: rectangle {index}, {(x0, y0, x1, y1)}, has no area.")
        boxes.append((x0, y0, x1, y1))
    return boxes
