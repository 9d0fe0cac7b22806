"""Source images: whatever a user hands over, decoded to upright 8-bit RGB, with errors that name the image."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from .errors_qzoom import InputError
from .processing_reading_qzoom import UnusableImage, opened_image


_UNIT_TOLERANCE = 1e-3  # resampled floats overshoot [0, 1] by rounding
_MOST_GROWTH = 8  # of an image on its way to a fixed token grid, as a multiple of the largest accepted source
_ALWAYS_PIXELS = 2**25  # small enough whatever the limit of the sources is


@dataclass(frozen=True)
class ImageSlot:
    """One image and where it stands in the request; all counts start at 0.

    Attributes:
        image: image as the user gave it.
        index: among all images of the call.
        row: prompt it belongs to, None where nothing says so.
        position: among the images of its row, None with `row`.
    """

    image: Any
    index: int
    row: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        place = "" if self.row is None else f" (row {self.row}, image {self.position})"
        return f"image {self.index}{place}"


def _split_stack(item: Any) -> list[Any]:
    """A 4-D array is a stack of images; everything else is one."""
    return list(item) if getattr(item, "ndim", None) == 4 else [item]


def images_by_row(images: Any) -> tuple[list[Any], list[int] | None]:
    """Flattens one image, a list of images, or a list of lists of images (one per prompt).

    Returns:
        The images in order, and the number of images of each row where the nesting tells it, else None.
    """
    if images is None:
        return [], None
    if not isinstance(images, (list, tuple)):
        return _split_stack(images), None
    if not any(isinstance(item, (list, tuple)) for item in images):
        return [image for item in images for image in _split_stack(item)], None
    rows = []
    for item in images:
        members = item if isinstance(item, (list, tuple)) else [] if item is None else [item]
        rows.append([image for member in members for image in _split_stack(member)])
    return [image for row in rows for image in row], [len(row) for row in rows]


def match_placeholders(
    prompts: list[str] | None, nested: list[int] | None, num_images: int, token: str
) -> list[int] | None:
    """Compares the images with the placeholders of the prompts.

    Args:
        prompts: rendered texts, None where only images are processed.
        nested: number of images of each row where they were nested by row.
        token: the placeholder of one image.

    Returns:
        The number of images of each row, None where nothing tells it.

    Raises:
        InputError: they differ; names the rows.
    """
    if prompts is None:
        return nested
    placeholders = [prompt.count(token) for prompt in prompts]
    if nested is not None and len(nested) != len(prompts):
        raise InputError(f"images has {len(nested)} rows, but there are {len(prompts)} prompts.")
    if nested is not None and nested != placeholders:
        wrong = [
            f"row {row} has {places} image placeholder(s) {token} but {count} image(s)"
            for row, (places, count) in enumerate(zip(placeholders, nested, strict=True))
            if places != count
        ]
        raise InputError(f"{'; '.join(wrong)}.")
    if nested is None and sum(placeholders) != num_images:
        by_row = ", ".join(f"row {row}: {count}" for row, count in enumerate(placeholders))
        raise InputError(
            f"the prompts have {sum(placeholders)} image placeholder(s) {token} ({by_row}), but {num_images} image(s) "
            "came with them. A chat message holds one {'type': 'image', 'image': ...} per image."
        )
    return placeholders


def place_images(images: list[Any], row_counts: list[int] | None) -> list[ImageSlot]:
    """Gives each image its place. `row_counts` sums to the number of images, or is None (no prompts)."""
    if row_counts is None:
        return [ImageSlot(image, index) for index, image in enumerate(images)]
    places = [(row, position) for row, count in enumerate(row_counts) for position in range(count)]
    return [ImageSlot(image, index, *place) for index, (image, place) in enumerate(zip(images, places, strict=True))]


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    if width < 1 or height < 1:
        raise UnusableImage(f"has no pixels: its size is {width} × {height}")
    if max_pixels is not None and width * height > max_pixels:
        raise UnusableImage(
            f"has {width} × {height} = {width * height} pixels, more than max_source_pixels = {max_pixels}. Downscale "
            "it, or raise the limit if you trust it: processor.max_source_pixels = ... (None for no limit)"
        )


def _grey_levels(values: np.ndarray) -> np.ndarray:
    """Any numeric array as uint8: the full range of its kind is mapped to 0..255, never clipped."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise UnusableImage(f"holds {values.dtype} values; expected integers or floats")
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.floating):
        if low >= -_UNIT_TOLERANCE and high <= 1 + _UNIT_TOLERANCE:
            return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
        if low >= 0 and high <= 255:
            return np.rint(values).astype(np.uint8)
        raise UnusableImage(
            f"holds floats from {low:g} to {high:g}; expected [0, 1] or [0, 255], not normalised values"
        )
    if low < 0 or high > 65535:
        raise UnusableImage(f"holds integers from {low} to {high}; expected 8-bit or 16-bit values")
    if values.dtype == np.uint8:
        return values
    # wide integer types do not tell their depth, 16-bit ones do
    if values.dtype.itemsize == 2 and values.dtype.kind == "u" or high > 255:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return values.astype(np.uint8)


def _channels_last(array: np.ndarray, data_format: str | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) → (H, W, C)."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise UnusableImage(f"has shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W)")
    first, last = array.shape[0], array.shape[-1]
    if data_format is None:
        is_first = first in (1, 3, 4) and (first == 3 or last not in (1, 3, 4))
    else:
        is_first = getattr(data_format, "value", data_format) == "channels_first"
    array = np.moveaxis(array, 0, -1) if is_first else array
    if array.shape[-1] not in (1, 2, 3, 4):
        raise UnusableImage(f"has shape {(*array.shape,)}, height × width × channels; expected 1 to 4 channels")
    return array


def _array_to_image(array: np.ndarray, data_format: str | None, max_pixels: int | None) -> Image.Image:
    array = _channels_last(array, data_format)
    _check_size(array.shape[1], array.shape[0], max_pixels)
    levels = _grey_levels(array)
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[-1] == 1 else levels))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; what is transparent shows white, as on paper."""
    if image.mode == "F" or image.mode.startswith("I"):
        # PIL would clip 16-bit values at 255
        image = _array_to_image(np.asarray(image), None, None)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return image.convert("RGB")


def _decode(image: Any, max_pixels: int | None, data_format: str | None) -> Image.Image:
    if isinstance(image, (str, os.PathLike, bytes, bytearray)):
        with opened_image(image, max_pixels) as encoded:
            return _decode(encoded, max_pixels, data_format)
    if isinstance(image, Image.Image):
        _check_size(*image.size, max_pixels)  # before the pixels are unpacked
        is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return _to_rgb(image if is_upright else ImageOps.exif_transpose(image))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise UnusableImage(
            f"is a {type(image).__name__}; expected a PIL image, an array, a tensor, a path, a URL or base64 text"
        )
    return _to_rgb(_array_to_image(image, data_format, max_pixels))


def _check_aspect_ratio(width: int, height: int, limit: float | None) -> None:
    ratio = max(width, height) / min(width, height)
    if limit is not None and ratio > limit:
        raise UnusableImage(
            f"has {width} × {height} pixels, an aspect ratio of {ratio:g}; this backbone takes at most {limit:g}. Cut "
            "it into shorter pieces, or pad its short side"
        )


def load_rgb(
    slot: ImageSlot,
    max_pixels: int | None = None,
    data_format: str | None = None,
    max_aspect_ratio: float | None = None,
) -> Image.Image:
    """The upright RGB image in a slot: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Args:
        slot: holds a PIL image of any mode, an array or tensor ((H, W), (H, W, C) or (C, H, W); integers, or floats in
            [0, 1] or [0, 255]), a path, a URL, base64 text or encoded bytes.
        max_pixels: largest accepted width × height; None for no limit.
        data_format: "channels_first" or "channels_last" for arrays whose shape does not tell.
        max_aspect_ratio: largest accepted quotient of the longer and the shorter side; None for no limit.

    Raises:
        InputError: the image is empty, too large, too long, of an unknown kind, or cannot be decoded; names its place.
    """
    try:
        image = _decode(slot.image, max_pixels, data_format)
        _check_aspect_ratio(*image.size, max_aspect_ratio)
        return image
    except UnusableImage as error:
        raise InputError(f"{slot} {error}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{slot} is larger than PIL's own limit (PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}; it "
            "refuses twice that), which guards against decompression bombs. Downscale it, or raise that limit and "
            f"max_source_pixels ({max_pixels}) if you trust it. PIL said: {error}"
        ) from error
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise InputError(f"{slot} cannot be read: {type(error).__name__}: {error}") from error


def source_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8, contiguous, of an RGB image."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _resized_size(width: int, height: int, size: Mapping[str, int] | int) -> tuple[int, int]:
    """(width, height) after the resize of transformers' CLIP-like image processors."""
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if size.get("height") and size.get("width"):
        return size["width"], size["height"]
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if not shortest or longest:
        raise InputError(f"a resize to {dict(size)} is unknown; expected height and width, or shortest_edge alone.")
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def _canvas(width: int, height: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) of a source after its padding."""
    return (max(width, height),) * 2 if settings.get("do_pad") else (width, height)


def _views(width: int, height: int, settings: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of a source after padding and resize, and of what is cut out of that."""
    resized = _canvas(width, height, settings)
    if settings.get("do_resize"):
        resized = _resized_size(*resized, settings["size"])
    if not settings.get("do_center_crop"):
        return resized, resized
    crop = settings["crop_size"]
    return resized, (crop, crop) if isinstance(crop, int) else (crop["width"], crop["height"])


def check_views(sizes: Sequence[tuple[int, int]], settings: Mapping[str, Any], patch: int, most: int | None) -> None:
    """Checks that every image gets the same token grid, and at a price that memory can pay.

    Args:
        sizes: (width, height) of the sources.
        settings: settings of the image processor, as `covered_rectangle` takes them.
        patch: side of a patch in pixels.
        most: largest accepted width × height of a source, None for no limit.

    Raises:
        InputError: names the image.
    """
    first: tuple[int, int] | None = None
    for index, size in enumerate(sizes):
        canvas = _canvas(*size, settings)
        resized, view = _views(*size, settings)
        area = max(canvas[0] * canvas[1], resized[0] * resized[1])
        if most is not None and area > max(_MOST_GROWTH * most, _ALWAYS_PIXELS):
            raise InputError(
                f"image {index} has {size[0]} × {size[1]} pixels and would take {area} on its way to the token grid: "
                "it is too long. Cut it into shorter pieces, or pad its short side."
            )
        first = first or view
        if view != first or view[0] != view[1] or view[0] % patch:
            raise InputError(
                f"image {index} has a coarse view of {view[0]} × {view[1]} pixels, which does not fit one fixed "
                f"square grid of whole patches ({patch} pixels a side) for all images. Set do_resize and "
                "do_center_crop with a square crop_size, or a size with height and width."
            )


def covered_rectangle(width: int, height: int, settings: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """The rectangle of source pixels that a fixed token grid covers.

    Args:
        width, height: size of the source in pixels.
        settings: the image processor's `do_pad` (to a square, about the centre), `do_resize`, `size`,
            `do_center_crop` and `crop_size`.

    Returns:
        (x0, y0, x1, y1), end exclusive; reaches beyond the source where it is padded.

    Raises:
        InputError: an unknown kind of resize.
    """
    canvas_width, canvas_height = _canvas(width, height, settings)
    # the source lies this far inside the canvas
    inset_x, inset_y = (canvas_width - width) // 2, (canvas_height - height) // 2
    (new_width, new_height), (view_width, view_height) = _views(width, height, settings)
    left, top = 0, 0
    if settings.get("do_center_crop"):
        left, top = (new_width - view_width) // 2, (new_height - view_height) // 2
    x_scale, y_scale = canvas_width / new_width, canvas_height / new_height
    x0, y0 = round(left * x_scale) - inset_x, round(top * y_scale) - inset_y
    x1, y1 = round((left + view_width) * x_scale) - inset_x, round((top + view_height) * y_scale) - inset_y
    # both ends of less than a pixel may round to the same number
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)
