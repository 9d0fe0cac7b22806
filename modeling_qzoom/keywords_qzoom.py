"""The keywords of a processor call: which exist, which are for `generate`, what the backbone's processor gets."""

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from transformers import GenerationConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from .options_qzoom import OPTION_NAMES, python_number


Budget = tuple[int | None, int | None]

GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs")
OWN_KEYWORDS = frozenset({"min_tokens", "max_tokens"})
GENERATE_KEYWORDS = frozenset(
    [
        *OPTION_NAMES,
        *vars(GenerationConfig()),
        *("effort", "return_zoom_reports", "generation_config", "logits_processor", "stopping_criteria", "streamer"),
        *("prefix_allowed_tokens_fn", "assistant_model", "custom_generate", "negative_prompt_ids", "synced_gpus"),
    ]
)
_AREA_KEYWORDS = frozenset({"min_pixels", "max_pixels"})
_PIXEL_KEYWORDS = ("do_normalize", "image_mean", "image_std", "resample")  # the model makes its crops without them


def option(keywords: dict[str, Any], group: str, name: str, default: Any = None) -> Any:
    """An option's value, given in its group's dictionary or flat."""
    for holder in (keywords.get(group, {}), keywords, keywords.get("common_kwargs", {})):
        if name in holder:
            return holder[name]
    return default


def _check_budget(min_tokens: int | None, max_tokens: int | None) -> None:
    for name, value in (("min_tokens", min_tokens), ("max_tokens", max_tokens)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive number of merged visual tokens or None, got {value!r}.")
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise ValueError(f"min_tokens ({min_tokens}) is larger than max_tokens ({max_tokens}).")


def budget_size(image_processor: BaseImageProcessor, budgets: Iterable[Budget]) -> dict[str, int]:
    """A token budget as the `size` of an image processor, whose "edges" are areas in pixels.

    Args:
        image_processor: its configured size is the starting point.
        budgets: (min_tokens, max_tokens) each; a later one wins and pushes the other bound where they cross.

    Raises:
        ValueError: a bound is not a positive integer, or a budget's bounds cross.
    """
    token_area = (image_processor.patch_size * image_processor.merge_size) ** 2
    smallest, largest = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    for low, high in budgets:
        _check_budget(low, high)
        low, high = python_number(low), python_number(high)
        if low is not None:
            smallest = low * token_area
            largest = max(largest, smallest)
        if high is not None:
            largest = high * token_area
            smallest = min(smallest, largest)
    return {"shortest_edge": smallest, "longest_edge": largest}


def accepted_keywords(processor: ProcessorMixin, video_processor_class: type | None) -> dict[str, set[str]]:
    """Per group of a backbone's processor, the names it takes; those of no group under ""."""
    annotations = processor.valid_processor_kwargs.__annotations__
    accepted = {group: set(annotations[group].__annotations__) for group in GROUPS}
    for group, part in (("images_kwargs", processor.image_processor), ("videos_kwargs", video_processor_class)):
        accepted[group] |= set(getattr(getattr(part, "valid_kwargs", None), "__annotations__", ()))
        accepted[group] -= _AREA_KEYWORDS
    accepted["common_kwargs"] = {"return_tensors"}
    accepted[""] = {name for name in annotations if not name.endswith("_kwargs")}
    return accepted


def _refuse(unknown: set[str], accepted: set[str]) -> None:
    if not unknown:
        return
    for_generate = sorted(unknown & GENERATE_KEYWORDS)
    if for_generate:
        raise ValueError(
            f"{', '.join(for_generate)}: for `generate`, not for the processor. Pass it to model.generate(...); with "
            f"a pipeline, pass generate_kwargs={{{for_generate[0]!r}: ...}}."
        )
    if unknown & _AREA_KEYWORDS:
        raise ValueError("min_pixels and max_pixels are not taken by a call: use min_tokens and max_tokens.")
    names = []
    for name in sorted(unknown):
        close = difflib.get_close_matches(name, sorted(accepted), n=2)
        names.append(f"{name!r} (did you mean {' or '.join(close)}?)" if close else repr(name))
    raise ValueError(f"QZoomProcessor does not know the keyword {', '.join(names)}.")


def _check_pixel_keywords(keywords: dict[str, Any]) -> None:
    """Refuses what would change the pixel values of the coarse view and leave those of the crop as they are."""
    if option(keywords, "images_kwargs", "do_rescale") is False:
        raise ValueError("do_rescale=False is not possible: every image becomes 8-bit RGB first, whatever it was.")
    holders = (keywords, *(keywords.get(group, {}) for group in ("images_kwargs", "common_kwargs")))
    given = [name for name in _PIXEL_KEYWORDS if any(holder.get(name) is not None for holder in holders)]
    if given:
        raise ValueError(
            f"{', '.join(given)}: not possible for one call. Only the coarse view would change; the model makes the "
            "crop itself, bicubic and with image_mean and image_std of its config. To normalise both in another way, "
            "set it on the image processor (processor.image_processor.image_mean = ...) and in the model's config "
            "(model.config.image_mean = ...; mean 0 and std 1 for do_normalize=False)."
        )


def check_keywords(keywords: dict[str, Any], accepted: dict[str, set[str]]) -> None:
    """Refuses what no part of the processor would read, and the options that zooming cannot live with.

    Args:
        keywords: of a call, flat or in the groups' dictionaries.
        accepted: from `accepted_keywords`.

    Raises:
        ValueError: an unknown keyword or one of `generate`, right padding, pixel values that the crop would not share.
    """
    flat = set().union(*accepted.values())
    for group in set(keywords) & set(accepted):
        _refuse(set(keywords[group]) - accepted[group], accepted[group])
    _refuse(set(keywords) - flat - set(accepted), flat | OWN_KEYWORDS)
    if option(keywords, "text_kwargs", "padding_side") not in (None, "left"):
        raise ValueError(
            "padding_side='right' is not possible: `generate` continues a batch at its right edge and decides whether "
            "to zoom at each row's last position, so rows are always padded on the left."
        )
    _check_pixel_keywords(keywords)


def backbone_keywords(keywords: dict[str, Any], size: dict[str, int] | None) -> dict[str, Any]:
    """What the backbone's processor is called with: the caller's keywords, and tensors padded on the left by default.

    Args:
        keywords: checked ones.
        size: of the coarse view, None where the caller or the image processor sets it.
    """
    groups = {group: dict(keywords.get(group, {})) for group in GROUPS}
    ours = {"padding_side", "input_data_format"}  # read from `keywords` or set below
    flat = {name: value for name, value in keywords.items() if name not in GROUPS and name not in ours}
    groups["images_kwargs"].pop("input_data_format", None)
    tensors = option(keywords, "text_kwargs", "return_tensors", "pt")
    if not any("return_tensors" in holder for holder in (flat, flat.get("common_kwargs", {}), *groups.values())):
        flat["return_tensors"] = tensors
    if tensors is not None and option(keywords, "text_kwargs", "padding") is None:
        flat.pop("padding", None)
        groups["text_kwargs"]["padding"] = True
    groups["text_kwargs"]["padding_side"] = "left"  # whatever the tokenizer was set to since
    if size is not None:
        groups["images_kwargs"]["size"] = size
    return {**flat, **groups}
