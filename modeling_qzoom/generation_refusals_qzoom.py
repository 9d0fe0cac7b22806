"""Decoding features that cannot go with zooming: each refused with its own reason and the way out."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin

from .backbone_cache_qzoom import CACHE
from .errors_qzoom import InputError, UnsupportedError
from .source_images_qzoom import SourceInput


_PLAIN = "With zoom='never' the plain model decides about it."
_EMBEDDED = "inputs_embeds hide where the images are; pass input_ids and pixel_values. " + _PLAIN


def check_padding(attention_mask: Tensor | None) -> None:
    """Checks that every row has tokens and ends with one.

    Raises:
        InputError: a row is empty or padded on the right.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return
    empty = (attention_mask == 0).all(1).nonzero()[:, 0].tolist()
    if empty:
        raise InputError(f"rows {empty} are empty: attention_mask hides every token of them. Leave these rows out.")
    wrong = (attention_mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if wrong:
        raise InputError(
            f"rows {wrong} are padded on the right; generation continues at the right end, so pad on the left "
            "(QZoomProcessor does; for another tokenizer set padding_side='left')."
        )


def require_dict_output(kwargs: dict[str, Any]) -> None:
    """Makes a call of `generate` return a dict, which reports can be put into.

    Args:
        kwargs: keyword arguments of `generate`; changed.

    Raises:
        InputError: the call asks for a tensor.
    """
    if kwargs.get("return_dict_in_generate") is False:
        raise InputError(
            "return_zoom_reports=True needs a dict output, but return_dict_in_generate=False was passed (pipelines do "
            "so); call model.generate directly to get reports."
        )
    kwargs["return_dict_in_generate"] = True


def infer_mask(input_ids: Tensor, kwargs: dict[str, Any], generation_configs: Sequence[Any]) -> Tensor | None:
    """The mask that `generate` of transformers will infer from pad tokens, None where it takes every token.

    Args:
        input_ids: (B, N) ids of the prompts.
        kwargs: keyword arguments of `generate`, without a mask.
        generation_configs: generation configs in force, the call's before the model's.
    """
    pad, eos = (first_setting(name, kwargs, generation_configs) for name in ("pad_token_id", "eos_token_id"))
    ends = eos.flatten().tolist() if isinstance(eos, Tensor) else eos if isinstance(eos, (list, tuple)) else [eos]
    pad = pad.item() if isinstance(pad, Tensor) else pad
    if pad is None or pad in ends or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()


def refuse_hidden_images(kwargs: dict[str, Any], source_images: SourceInput | None) -> None:
    """Checks a call that gives embeddings instead of ids.

    Raises:
        UnsupportedError: it gives images as well.
    """
    if source_images is not None or any(
        kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs")
    ):
        raise UnsupportedError(_EMBEDDED)


def refuse_batched_images(inputs: Sequence[Sequence[int]], image_token_id: int) -> None:
    """Checks a call of `generate_batch`.

    Raises:
        UnsupportedError: a prompt holds image tokens.
    """
    rows = [row for row, ids in enumerate(inputs) if image_token_id in ids]
    if rows:
        raise UnsupportedError(
            f"generate_batch (paged generation) takes token ids only, but prompts {rows} hold image tokens; use "
            "generate."
        )


def first_setting(name: str, kwargs: dict[str, Any], generation_configs: Sequence[Any]) -> Any:
    """A setting of `generate`, from the call or the first generation config that has it."""
    values = (kwargs.get(name), *(getattr(entry, name, None) for entry in generation_configs))
    return next((value for value in values if value is not None), None)


def _is_given(value: Any) -> bool:
    return value is not None


def _is_several(value: Any) -> bool:
    return (value or 1) > 1


_DRAFTS = "assisted and prompt-lookup decoding feed the whole prompt again, without the crop that the cache holds"
_MOVED = (
    "{name} selects a decoding loop that transformers loads from the Hub as custom_generate, without the prefill that "
    "zooms"
)
_TWO_SEQUENCES = "{name}=True is not available while zooming: the layers see two different sequences"
# setting, the values of it that are refused, and why
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("assistant_model", _is_given, _DRAFTS),
    ("use_mtp", bool, _DRAFTS),
    ("prompt_lookup_num_tokens", _is_given, _DRAFTS),
    ("assistant_early_exit", _is_given, _DRAFTS),
    ("custom_generate", _is_given, "custom_generate replaces the decoding loop and with it the prefill that zooms"),
    ("penalty_alpha", bool, _MOVED),
    ("dola_layers", bool, _MOVED),
    ("constraints", bool, _MOVED),
    ("force_words_ids", bool, _MOVED),
    ("num_beam_groups", _is_several, _MOVED),
    (
        "synced_gpus",
        bool,
        "synced_gpus=True needs every process to run the same layers, but each row decides for itself whether to zoom",
    ),
    ("prefill_chunk_size", _is_given, "chunked prefill cannot stop between layers, where the gate decides"),
    (
        "cache_implementation",
        lambda value: value == "paged",
        "paged generation replaces generate by its own scheduler",
    ),
    (
        "inputs_embeds",
        _is_given,
        "inputs_embeds hide where the images are; pass input_ids and pixel_values",
    ),
    (
        CACHE,
        lambda cache: cache is not None and cache.get_seq_length() > 0,
        "past_key_values of an earlier turn cannot be continued with images in the prompt: where the crop goes is "
        "decided anew for every question. Pass the whole conversation without a cache",
    ),
    ("output_attentions", bool, _TWO_SEQUENCES),
    ("output_hidden_states", bool, _TWO_SEQUENCES),
)


def refuse_unsupported(
    args: tuple, generation_configs: Sequence, kwargs: dict[str, Any], way_out: str = _PLAIN
) -> None:
    """Checks a call whose prefill is ours, as that of one that may zoom is.

    Args:
        args: positional arguments of `generate` after the generation config.
        generation_configs: generation configs in force, the call's before the model's.
        kwargs: keyword arguments of `generate`, the cache under the name that transformers gives it.
        way_out: the sentence behind each reason.

    Raises:
        UnsupportedError: names the feature, the reason and the way out.
    """
    # positional arguments under the names that `generate` of transformers gives them
    after_config = list(signature(GenerationMixin.generate).parameters)[3:]
    named = {**dict(zip(after_config, args)), **kwargs}
    for name, is_refused, reason in _REFUSED:
        if is_refused(first_setting(name, named, generation_configs)):
            raise UnsupportedError(f"{reason.format(name=name)}. {way_out}")
