"""From the arguments of `generate` to one checked request, before anything runs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from .backbone_adapters_qzoom import RowAdapters, refuse_learned_prompt, row_adapters
from .backbone_cache_qzoom import CACHE, refuse_zoomed_cache
from .errors_qzoom import InputError, UnsupportedError
from .generation_refusals_qzoom import (
    check_padding,
    first_setting,
    infer_mask,
    refuse_hidden_images,
    refuse_unsupported,
)
from .prompt_checks_qzoom import check_ids, check_mask, check_prompt
from .source_images_qzoom import SourceInput
from .visor_configurations_qzoom import by_row, is_routed, layer_kinds
from .zoom_crops_qzoom import crop_recipe
from .zoom_model_qzoom import ZoomModel
from .zoom_options_qzoom import ZoomOptions
from .zoom_page_matching_qzoom import Prompts, pages_by_row, shared_beginnings
from .zoom_pages_qzoom import Page
from .zoom_request_qzoom import ZoomRequest, collect_grid_boxes, collect_sources


_PLAIN = "With zoom='never' the plain model decides about it."
_WITHOUT_PAGE = "With zoom='never' and without a page the plain model decides about it."


def _checked_mask(
    input_ids: Tensor, mask: Tensor | None, cached: int, kwargs: dict[str, Any], configs: Sequence[GenerationConfig]
) -> Tensor | None:
    """The mask of a call, or what `generate` of transformers will infer where the call has none.

    Args:
        input_ids: (B, N).
        mask: (B, N), or (B, cached + N) behind `cached` tokens of an earlier turn.
    """
    length = input_ids.shape[1]
    if mask is None:
        return None if cached else infer_mask(input_ids, kwargs, configs)
    check_mask(mask, len(input_ids), (length, cached + length) if cached else (length,))
    return mask


def plan_zoom(
    model: ZoomModel,
    options: ZoomOptions,
    input_ids: Any,
    source_images: SourceInput | None,
    source_boxes: Any,
    args: tuple,
    configs: Sequence[GenerationConfig],
    kwargs: dict[str, Any],
    page: Any = None,
) -> ZoomRequest | None:
    """Checks the inputs of `generate`, before anything runs.

    Args:
        model: model that generates.
        options: resolved options of the call.
        input_ids: (B, N) ids, None where the call has none.
        source_images, source_boxes: images in their own resolution, and the rectangles under their grids.
        args, kwargs: the other arguments of `generate`.
        configs: generation configs in force, the call's before the model's.
        page: a page that the prompts continue from, or one (or None) per row.

    Returns:
        What our prefill needs; None where the plain model answers.

    Raises:
        InputError: inputs that do not fit each other, or no sources for the images of a prompt.
        UnsupportedError: a decoding feature that cannot go with our prefill.
    """
    cache, mask, embeds = (kwargs.get(name) for name in (CACHE, "attention_mask", "inputs_embeds"))
    refuse_zoomed_cache(cache)
    has_ids = input_ids is not None and embeds is None
    if has_ids:
        check_ids(input_ids, getattr(model.get_input_embeddings(), "num_embeddings", None))
    page = _given_page(page, has_ids)
    sparse = _sparse_rows(model, options, input_ids, page)
    is_plain = options.zoom == "never" and page is None
    if is_plain and not (has_ids and (options.skip_unread or sparse)):
        return None
    if input_ids is None:
        _check_without_ids(embeds, mask, source_images, kwargs)
        return None
    if embeds is None:
        mask = _checked_mask(input_ids, mask, 0 if cache is None else cache.get_seq_length(), kwargs, configs)
    check_padding(mask)
    if is_plain:
        return _plain_request(model, options, input_ids, args, configs, kwargs)
    has_images = bool((input_ids == model.config.image_token_id).any())
    if has_images or not model.config.backbone.grid.has_budget:
        crop_recipe(model.config, options)  # refuses an impossible budget before anything runs
    if not has_images and page is None:
        collect_sources(source_images, [[] for _ in input_ids])  # refuses images that no prompt mentions
        return None
    refuse_unsupported(args, configs, kwargs, _PLAIN if page is None else _WITHOUT_PAGE)
    refuse_learned_prompt(model)
    spans = check_prompt(model.config, input_ids, mask, kwargs)
    adapters = row_adapters(model, len(input_ids), _repeats(configs, kwargs))
    request = ZoomRequest(_under_adapters(options, adapters), spans, [], [], adapters, makes_cache=cache is None)
    request = request if options.zoom == "never" else _with_sources(request, source_images, source_boxes)
    return _with_beginnings(model, request, page, input_ids, mask, kwargs)


def _check_without_ids(
    embeds: Tensor | None, mask: Tensor | None, source_images: SourceInput | None, kwargs: dict[str, Any]
) -> None:
    """Checks a call of embeddings, or of nothing, which the plain model answers."""
    if embeds is not None:
        refuse_hidden_images(kwargs, source_images)
    check_padding(mask)


def _with_sources(request: ZoomRequest, source_images: SourceInput | None, source_boxes: Any) -> ZoomRequest:
    """The request with the images that crops are cut out of."""
    sources = collect_sources(source_images, request.spans)
    return replace(request, sources=sources, grid_boxes=collect_grid_boxes(source_boxes, len(sources)))


def _given_page(page: Any, has_ids: bool) -> Any:
    """The page of a call, or its list of pages; None where every entry is.

    Raises:
        InputError: a page without ids.
    """
    if isinstance(page, (list, tuple)) and all(entry is None for entry in page):
        return None
    if page is not None and not has_ids:
        raise InputError("page: which tokens a prompt begins with is seen from input_ids only; pass them.")
    return page


def _sparse_rows(model: ZoomModel, options: ZoomOptions, input_ids: Any, page: Any) -> bool:
    """Whether a row is answered under a configuration of VISOR.

    Raises:
        InputError: a configuration that the checkpoint does not have, or names for another number of rows.
        UnsupportedError: together with zooming or a page, or with embeddings, which hide where visual tokens are.
    """
    names = by_row(options.vision, 1 if input_ids is None else len(input_ids))
    visor = model.config.visor
    sparse = any(is_routed(visor, name) or layer_kinds(visor, name) is not None for name in names)
    if sparse and options.zoom != "never":
        raise UnsupportedError(
            f"vision={options.vision!r} does not go with zoom={options.zoom!r} yet; pass zoom='never', or "
            "vision='dense'."
        )
    if sparse and page is not None:
        raise UnsupportedError(
            f"vision={options.vision!r} does not go with a page, which was read by all layers; leave the page out, or "
            "pass vision='dense'."
        )
    if sparse and input_ids is None:
        raise UnsupportedError(
            f"vision={options.vision!r} must know where visual tokens are; pass input_ids, or vision='dense'."
        )
    return sparse


def _plain_request(
    model: ZoomModel,
    options: ZoomOptions,
    input_ids: Tensor,
    args: tuple,
    configs: Sequence[GenerationConfig],
    kwargs: dict[str, Any],
) -> ZoomRequest:
    """The request of a call that does not zoom but has tokens left out that nobody reads."""
    refuse_unsupported(
        args, configs, kwargs, "With vision='dense' and without skip_unread=True the plain model decides."
    )
    refuse_learned_prompt(model)
    adapters = row_adapters(model, len(input_ids), _repeats(configs, kwargs))
    options = _under_adapters(options, adapters)
    return ZoomRequest(options, [], [], [], adapters, makes_cache=kwargs.get(CACHE) is None)


def _repeats(configs: Sequence[GenerationConfig], kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each row."""
    counts = (first_setting(name, kwargs, configs) for name in ("num_beams", "num_return_sequences"))
    return max(count for count in (1, *counts) if isinstance(count, int))


def _with_beginnings(
    model: ZoomModel,
    request: ZoomRequest,
    page: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> ZoomRequest:
    """The request with what its rows need not run themselves: pages, and beginnings that they share.

    Args:
        input_ids, attention_mask: (B, N), checked.
        kwargs: keyword arguments of `generate`, checked.

    Raises:
        InputError: a prompt that does not begin with its page, or a page that this model has not read.
        UnsupportedError: a page in a call with adapters by row.
    """
    if page is not None and request.adapters is not None:
        raise UnsupportedError(
            "page: adapter_names and activated LoRA give every row layers of its own, but a page was read with one "
            "set of weights; leave page out."
        )
    has_own_positions = kwargs.get("position_ids") is not None
    if page is not None and has_own_positions:
        raise UnsupportedError(
            "page: it was read at the positions that the model gives its tokens; leave position_ids out."
        )
    rows = len(input_ids)
    may_share = rows > 1 and request.adapters is None and request.options.skips_unread and not has_own_positions
    if page is None and not may_share:
        return request
    prompts = Prompts.of(model.config, input_ids, attention_mask, request.spans, kwargs)
    pages: list[Page | None] = [None] * rows
    if page is not None:
        pages = pages_by_row(model, page, prompts)
    if not may_share:
        return replace(request, pages=pages)
    alone = [row for row, read in enumerate(pages) if read is None]
    shared, same_images = shared_beginnings(prompts, alone)
    return replace(request, pages=pages, shared=shared, same_images=same_images)


def _under_adapters(options: ZoomOptions, adapters: RowAdapters | None) -> ZoomOptions:
    """The options of a call whose layers peft may give offsets, which count whole sequences from their end.

    Raises:
        UnsupportedError: an option that runs layers for some tokens only.
    """
    if adapters is None or adapters.offsets is None:
        return options
    for name, value in (("gate_branch", "full"), ("region_branch", "full"), ("keep_share", 1.0)):
        if getattr(options, name) != value:
            raise UnsupportedError(
                f"{name}={getattr(options, name)!r} runs layers for some tokens only, where an activated LoRA cannot "
                f"tell at which it begins; pass {name}={value!r}."
            )
    if options.skip_unread:
        raise UnsupportedError(
            "skip_unread=True runs the last layer for one token only, where an activated LoRA cannot tell at which it "
            "begins; leave it out."
        )
    return replace(options, skip_unread=False)
