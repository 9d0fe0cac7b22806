"""The budget of the coarse view: merged visual tokens an image, and the image processor's `size` for it."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from .errors_qzoom import InputError
from .zoom_options_qzoom import check_order, check_tokens, python_number


Budget = tuple[int | None, int | None]

MOST_TOKENS = 2**18  # no supported backbone has more positions


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_budget(min_tokens: int | None, max_tokens: int | None) -> None:
    """Checks a budget's bounds.

    Raises:
        InputError: a bound is not a positive integer, larger than any backbone's context, or the bounds cross.
    """
    for name, value in (("min_tokens", min_tokens), ("max_tokens", max_tokens)):
        check_tokens(name, value)
        if value is not None and value > MOST_TOKENS:
            raise InputError(
                f"{name} = {value} is more than {MOST_TOKENS} tokens, the longest context of any supported backbone; "
                "an image alone would not fit."
            )
    check_order(("min_tokens", "max_tokens"), min_tokens, max_tokens)


def token_side(image_processor: BaseImageProcessor) -> int:
    """Side in pixels of a merged visual token."""
    return image_processor.patch_size * image_processor.merge_size


def area_size(size: Any, image_processor: BaseImageProcessor, name: str) -> dict[str, int]:
    """A `size` of the image processor, whose "edges" are areas in pixels, as a plain dict.

    Args:
        name: where it was given, for the error.

    Raises:
        InputError: anything else than the two areas, or a smallest area beyond any backbone's context.
    """
    try:
        areas = {key: value for key, value in dict(size).items() if value is not None}
    except (TypeError, ValueError):
        areas = {}
    if set(areas) != {"shortest_edge", "longest_edge"} or not all(_is_count(value) for value in areas.values()):
        raise InputError(
            f"{name} must be {{'shortest_edge': ..., 'longest_edge': ...}}, the smallest and the largest area of the "
            f"coarse view in pixels, got {size!r}. In tokens: min_tokens and max_tokens."
        )
    most = MOST_TOKENS * token_side(image_processor) ** 2
    if areas["shortest_edge"] > most:
        raise InputError(
            f"{name} asks for at least {areas['shortest_edge']} pixels an image, which is more than {MOST_TOKENS} "
            "tokens, the longest context of any supported backbone."
        )
    return {"shortest_edge": int(areas["shortest_edge"]), "longest_edge": int(areas["longest_edge"])}


def configured_size(image_processor: BaseImageProcessor) -> dict[str, int]:
    """The `size` that an image processor is set to, with `min_pixels` and `max_pixels`, which win over it."""
    size = area_size(image_processor.size, image_processor, "image_processor.size")
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        bound = getattr(image_processor, name, None)
        if bound is not None:
            size = area_size({**size, edge: bound}, image_processor, f"image_processor.{name}")
            size = uncross(size, edge)
    return size


def uncross(size: dict[str, int], edge: str) -> dict[str, int]:
    """A size whose other edge is pushed out of the way of the one that was given last."""
    smallest, largest = size["shortest_edge"], size["longest_edge"]
    if smallest <= largest:
        return size
    return {"shortest_edge": size[edge], "longest_edge": size[edge]}


def budget_size(size: dict[str, int], token_area: int, budgets: Iterable[Budget]) -> dict[str, int]:
    """A `size` with token budgets laid over it.

    Args:
        size: the starting point.
        token_area: pixels of a merged visual token.
        budgets: (min_tokens, max_tokens) each; a later one wins and pushes the other bound where they cross.

    Raises:
        InputError: as `check_budget`.
    """
    for low, high in budgets:
        check_budget(low, high)
        for edge, bound in (("shortest_edge", python_number(low)), ("longest_edge", python_number(high))):
            if bound is not None:
                size = uncross({**size, edge: bound * token_area}, edge)
    return size
