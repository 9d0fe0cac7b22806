"""Settings of the image processor, of a call or its own: what the crop must share, and what would have no effect."""

import inspect
import math
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor, get_size_dict

from .errors_qzoom import InputError
from .processing_keywords_qzoom import option
from .processing_sizes_qzoom import MOST_TOKENS


# the model makes its crops itself
_PIXEL_KEYWORDS = ("do_normalize", "image_mean", "image_std", "resample", "rescale_factor")
_GRID_KEYWORDS = ("patch_size", "merge_size", "temporal_patch_size")
_READ_ELSEWHERE = frozenset(
    {"size", "do_resize", "do_rescale", "do_convert_rgb", "data_format", "input_data_format", "device"}
    | {"return_tensors", "disable_grouping", *_PIXEL_KEYWORDS, *_GRID_KEYWORDS}
)
_CROP_RULE = (
    "Only the coarse view would change; the model makes the crop itself, bicubic and with image_mean and image_std of "
    "its config. To normalise both in another way, set it on the image processor "
    "(processor.image_processor.image_mean = ...) and in the model's config (model.config.image_mean = ...); mean 0 "
    "and std 1 on both leave pixels as they are."
)


def setting(keywords: dict[str, Any], image_processor: BaseImageProcessor, name: str) -> Any:
    """A setting's value for one call: the caller's, or the image processor's own."""
    value = option(keywords, "images_kwargs", name)
    return getattr(image_processor, name, None) if value is None else value


def _is_bicubic(resample: Any) -> bool:
    return getattr(resample, "value", resample) in (3, "bicubic")


def _is_same(name: str, value: Any, configured: Any) -> bool:
    if name == "resample":
        return _is_bicubic(value) and _is_bicubic(configured)
    try:
        return bool(np.allclose(np.asarray(value, float), np.asarray(configured, float)))
    except (TypeError, ValueError):
        return False


def _used_names(image_processor: BaseImageProcessor) -> set[str]:
    """The settings that a class of image processors reads; what else it is given, it drops without a word."""
    return set(inspect.signature(type(image_processor)._preprocess).parameters) - {"pad_size"}


def check_image_processor(image_processor: BaseImageProcessor) -> None:
    """Refuses an image processor whose own settings change the coarse view and not the crop, or change nothing.

    Raises:
        InputError: names the setting and its value.
    """
    if not getattr(image_processor, "do_normalize", True):
        raise InputError(
            f"image_processor.do_normalize = {image_processor.do_normalize} is not possible. {_CROP_RULE}"
        )
    if not getattr(image_processor, "do_rescale", True):
        raise InputError(
            f"image_processor.do_rescale = {image_processor.do_rescale} is not possible: the model scales the 8-bit "
            "pixels of its crops to [0, 1]. Set it to True."
        )
    if not math.isclose(getattr(image_processor, "rescale_factor", 1 / 255) or 0, 1 / 255, rel_tol=1e-3):
        raise InputError(
            f"image_processor.rescale_factor = {image_processor.rescale_factor} is not possible: the model scales the "
            "8-bit pixels of its crops by 1/255. Set the same here."
        )
    if not _is_bicubic(image_processor.resample):
        raise InputError(f"image_processor.resample = {image_processor.resample} is not possible. {_CROP_RULE}")
    for name in ("do_center_crop", "do_pad"):
        if getattr(image_processor, name, None) and name not in _used_names(image_processor):
            raise InputError(
                f"image_processor.{name} = True has no effect: {type(image_processor).__name__} does not do it. Set "
                "it to False."
            )


def check_image_keywords(keywords: dict[str, Any], image_processor: BaseImageProcessor, has_videos: bool) -> None:
    """Refuses keywords of a call that would change the coarse view and not the crop, or change nothing.

    Args:
        keywords: known ones, flat or in the groups' dictionaries.
        has_videos: flat keywords may be for videos.

    Raises:
        InputError: names the keyword.
    """
    if option(keywords, "images_kwargs", "do_rescale") is False:
        raise InputError("do_rescale=False is not possible: every image becomes 8-bit RGB first, whatever it was.")
    if option(keywords, "images_kwargs", "do_convert_rgb") is False:
        raise InputError("do_convert_rgb=False is not possible: every image becomes 8-bit RGB first.")
    holders = (keywords, keywords.get("images_kwargs", {}), keywords.get("common_kwargs", {}))
    given = {name: value for holder in holders for name, value in holder.items() if value is not None}
    changed = [
        name
        for name in _PIXEL_KEYWORDS
        if name in given and not _is_same(name, given[name], getattr(image_processor, name, None))
    ]
    if changed:
        raise InputError(f"{', '.join(changed)}: not possible for one call. {_CROP_RULE}")
    for name in _GRID_KEYWORDS:
        if name in given and hasattr(image_processor, name) and given[name] != getattr(image_processor, name):
            raise InputError(
                f"{name}={given[name]!r} is not possible: the model's vision tower has {name} = "
                f"{getattr(image_processor, name)}."
            )
    for name, choices in (("input_data_format", ("channels_first", "channels_last")), ("data_format", ())):
        value = given.get(name)
        if value is not None and getattr(value, "value", value) not in (choices or ("channels_first",)):
            raise InputError(f"{name} must be {' or '.join(choices or ('channels_first',))}, got {value!r}.")
    if getattr(image_processor, "backend", None) == "pil" and str(given.get("device", "cpu")) != "cpu":
        raise InputError(
            f"device={given['device']!r} is not possible: without torchvision images are prepared on the CPU. Move "
            "the result: inputs.to(device)."
        )
    group = keywords.get("images_kwargs", {})
    names = set(getattr(image_processor.valid_kwargs, "__annotations__", ())) & set(group if has_videos else given)
    for name in sorted(names - _READ_ELSEWHERE - _used_names(image_processor)):
        if given.get(name) not in (None, False):
            raise InputError(
                f"{name}={given[name]!r} would have no effect: {type(image_processor).__name__} does not read it."
            )
    for name, switch in (("size", "do_resize"), ("crop_size", "do_center_crop")):
        if given.get(name) is not None and not setting(keywords, image_processor, switch):
            raise InputError(f"{name}={given[name]!r} would have no effect without {switch}=True.")


def _sides(value: Any, name: str, default_to_square: bool, most: int) -> dict[str, int]:
    """A size in pixels as a dict of its sides.

    Raises:
        InputError: it is none, or larger than `most`.
    """
    try:
        size = get_size_dict(dict(value) if hasattr(value, "keys") else value, default_to_square=default_to_square)
        sides = {key: side for key, side in dict(size).items() if side is not None}
    except (TypeError, ValueError):
        sides = {}
    if not sides or not all(type(side) is int and 1 <= side <= most for side in sides.values()):
        raise InputError(
            f"{name} must be a side in pixels or {{'height': ..., 'width': ...}}, each from 1 to {most}, got "
            f"{value!r}."
        )
    return sides


def fixed_view(keywords: dict[str, Any], image_processor: BaseImageProcessor, patch: int) -> dict[str, Any]:
    """The settings that say what a fixed token grid covers, as `processing_images_qzoom.covered_rectangle` reads them.

    Args:
        patch: side of the grid's patches in pixels.

    Raises:
        InputError: a padding that is not to a square, or a size that is none.
    """
    names = ("do_pad", "do_resize", "size", "do_center_crop", "crop_size")
    settings = {name: setting(keywords, image_processor, name) for name in names}
    if settings["do_pad"] and not hasattr(image_processor, "pad_to_square"):
        raise InputError(f"do_pad of {type(image_processor).__name__} is not a padding to a square.")
    most = patch * math.isqrt(MOST_TOKENS)
    for name, switch, is_square in (("size", "do_resize", False), ("crop_size", "do_center_crop", True)):
        if settings[switch]:
            is_square = is_square or bool(getattr(image_processor, "default_to_square", False))
            settings[name] = _sides(settings[name], name, is_square, most)
    return settings
