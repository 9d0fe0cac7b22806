"""Decoding features that cannot go with zooming: each refused with its own reason and the way out."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .backbone_cache_qzoom import CACHE


_PLAIN = "With zoom='never' the plain model decides about it."
_EMBEDDED = "inputs_embeds hide where the images are; pass input_ids and pixel_values. " + _PLAIN


def check_padding(attention_mask: Tensor | None) -> None:
    """Raises:
    ValueError: a row is empty or padded on the right.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return
    empty = (attention_mask == 0).all(1).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"rows {empty} are empty: attention_mask hides every token of them. Leave these rows out.")
    wrong = (attention_mask[:, -1] == 0).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"rows {wrong} are padded on the right; generation continues at the right end, so pad on the left "
            "(QZoomProcessor does; for another tokenizer set padding_side='left')."
        )


def infer_mask(input_ids: Tensor, kwargs: dict[str, Any], generation_configs: Sequence[Any]) -> Tensor | None:
    """The mask that `generate` of transformers will infer from pad tokens, None where it takes every token.

    Args:
        input_ids: (B, N).
        kwargs: keyword arguments of `generate`, without a mask.
        generation_configs: those in force, the call's before the model's.
    """
    pad, eos = (first_setting(name, kwargs, generation_configs) for name in ("pad_token_id", "eos_token_id"))
    ends = eos.flatten().tolist() if isinstance(eos, Tensor) else eos if isinstance(eos, (list, tuple)) else [eos]
    pad = pad.item() if isinstance(pad, Tensor) else pad
    if pad is None or pad in ends or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()


def refuse_hidden_images(kwargs: dict[str, Any], source_images: Any) -> None:
    """Checks a call that gives embeddings instead of ids.

    Raises:
        ValueError: it gives images as well.
    """
    if source_images is not None or any(
        kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs")
    ):
        raise ValueError(_EMBEDDED)


def refuse_batched_images(inputs: Sequence[Sequence[int]], image_token_id: int) -> None:
    """Checks a call of `generate_batch`.

    Raises:
        ValueError: a prompt holds image tokens.
    """
    rows = [row for row, ids in enumerate(inputs) if image_token_id in ids]
    if rows:
        raise ValueError(
            f"generate_batch (paged generation) takes token ids only, but prompts {rows} hold image tokens; use "
            "generate."
        )


def first_setting(name: str, kwargs: dict[str, Any], generation_configs: Sequence[Any]) -> Any:
    """A setting of `generate`, from the call or the first generation config that has it."""
    values = (kwargs.get(name), *(getattr(entry, name, None) for entry in generation_configs))
    return next((value for value in values if value is not None), None)


def refuse_unsupported(args: tuple, generation_configs: Sequence, kwargs: dict[str, Any]) -> None:
    """Checks a call that may zoom.

    Args:
        args: positional arguments of `generate` after the generation config.
        generation_configs: those in force, the call's before the model's.
        kwargs: keyword arguments of `generate`, the cache under the name that transformers gives it.

    Raises:
        ValueError: names the feature, the reason and the way out.
    """

    def setting(name: str) -> Any:
        return first_setting(name, kwargs, generation_configs)

    # order of generate's own parameters after generation_config
    positional = dict(
        zip(
            (
                "logits_processor",
                "stopping_criteria",
                "prefix_allowed_tokens_fn",
                "synced_gpus",
                "assistant_model",
                "streamer",
                "negative_prompt_ids",
                "negative_prompt_attention_mask",
                "custom_generate",
            ),
            args,
        )
    )
    named = {**positional, **kwargs}
    drafting = ("prompt_lookup_num_tokens", "assistant_early_exit")
    if (
        named.get("assistant_model") is not None
        or setting("use_mtp")
        or any(setting(name) is not None for name in drafting)
    ):
        raise ValueError(
            "assisted and prompt-lookup decoding feed the whole prompt again, without the crop that the cache holds. "
            + _PLAIN
        )
    if named.get("custom_generate") is not None:
        raise ValueError("custom_generate replaces the decoding loop and with it the prefill that zooms. " + _PLAIN)
    elsewhere = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids")
    moved = [name for name in elsewhere if setting(name)]
    if (setting("num_beam_groups") or 1) > 1:
        moved.append("num_beam_groups")
    if moved:
        raise ValueError(
            f"{moved[0]} selects a decoding loop that transformers loads from the Hub as custom_generate, without the "
            "prefill that zooms. " + _PLAIN
        )
    if named.get("synced_gpus"):
        raise ValueError(
            "synced_gpus=True needs every process to run the same layers, but each row decides for itself whether it "
            "zooms. " + _PLAIN
        )
    if setting("prefill_chunk_size") is not None:
        raise ValueError("chunked prefill cannot stop between layers, where the gate decides. " + _PLAIN)
    if setting("cache_implementation") == "paged":
        raise ValueError("paged generation replaces generate by its own scheduler. " + _PLAIN)
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError(_EMBEDDED)
    past = kwargs.get(CACHE)
    if past is not None and past.get_seq_length() > 0:
        raise ValueError(
            "past_key_values of an earlier turn cannot be continued with images in the prompt: where the crop goes is "
            "decided anew for every question. Pass the whole conversation without a cache. " + _PLAIN
        )
    for name in ("output_attentions", "output_hidden_states"):
        if setting(name):
            raise ValueError(
                f"{name}=True is not available while zooming: the layers see two different sequences. " + _PLAIN
            )
