"""The keywords of a processor call: which exist, which are for `generate`, what the backbone's processor gets."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .errors_qzoom import InputError
from .messages_qzoom import similar
from .zoom_options_qzoom import OPTION_NAMES


logger = logging.get_logger(__name__)

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
_OF_NEWER_TRANSFORMERS = frozenset({"sanitize_control_tokens"})  # whoever asks for safety must not be passed over
_SPECIAL_TOKENS = frozenset(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)  # variables of many templates
_CLOSE = 0.8  # likeness from which on a name counts as a misspelt one
_GUESS = 0.6  # likeness of the names that are proposed for one that is refused in any case


def option(keywords: dict[str, Any], group: str, name: str, default: Any = None) -> Any:
    """An option's value, given in its group's dictionary or flat."""
    for holder in (keywords.get(group, {}), keywords, keywords.get("common_kwargs", {})):
        if name in holder:
            return holder[name]
    return default


def accepted_keywords(
    processor: ProcessorMixin, video_processor_class: type | None, *, takes_videos: bool
) -> dict[str, set[str]]:
    """Per group of a backbone's processor, the names it takes; those of no group under ""."""
    annotations = processor.valid_processor_kwargs.__annotations__
    accepted = {group: set(annotations[group].__annotations__) for group in GROUPS}
    if not takes_videos:
        accepted["videos_kwargs"] = set()
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
        raise InputError(
            f"{', '.join(for_generate)}: for `generate`, not for the processor. Pass it to model.generate(...); with "
            f"a pipeline, pass generate_kwargs={{{for_generate[0]!r}: ...}}."
        )
    if unknown & _AREA_KEYWORDS:
        raise InputError("min_pixels and max_pixels are not taken by a call: use min_tokens and max_tokens.")
    names = []
    for name in sorted(unknown):
        close = similar(name, accepted, _GUESS, count=2)
        names.append(f"{name!r} (did you mean {' or '.join(close)}?)" if close else repr(name))
    raise InputError(f"QZoomProcessor does not know the keyword {', '.join(names)}.")


def check_keywords(keywords: dict[str, Any], accepted: dict[str, set[str]]) -> None:
    """Refuses what no part of the processor would read.

    Args:
        keywords: keywords of a call, flat or in the groups' dictionaries.
        accepted: accepted names by group, from `accepted_keywords`.

    Raises:
        InputError: an unknown keyword or one of `generate`, or a padding side that is none.
    """
    flat = set().union(*accepted.values())
    for group in set(keywords) & set(accepted):
        if not isinstance(keywords[group], dict):
            raise InputError(f"{group} must be a dict of keywords, got {keywords[group]!r}.")
        _refuse(set(keywords[group]) - accepted[group], accepted[group])
    _refuse(set(keywords) - flat - set(accepted), flat | OWN_KEYWORDS)
    side = option(keywords, "text_kwargs", "padding_side")
    if side not in (None, "left", "right"):
        raise InputError(f"padding_side must be 'left' or 'right', got {side!r}.")


def check_given_at_loading(names: set[str]) -> None:
    """Refuses misspelt names of our own settings in `from_pretrained`, which drops what it does not know.

    Args:
        names: names of the arguments of `from_pretrained`.

    Raises:
        InputError: names what was meant.
    """
    ours = (*OWN_KEYWORDS, "max_source_pixels")
    for name in sorted(names - set(ours)):
        close = similar(name, ours, _CLOSE)
        if close:
            raise InputError(f"QZoomProcessor.from_pretrained does not know {name!r}; did you mean {close[0]}?")


def split_template_keywords(
    keywords: dict[str, Any], variables: frozenset[str], accepted: dict[str, set[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sorts the free keywords of `apply_chat_template` into the template's and the processor's.

    What neither knows counts as a variable for other templates and is left out, as no part would read it: harnesses
    pass `enable_thinking=False` and the like to every model.

    Args:
        variables: names that the template reads.
        accepted: accepted names by group, from `accepted_keywords`.

    Raises:
        InputError: a keyword of `generate`, or a name close to a keyword of the processor.
    """
    known = set().union(*accepted.values(), accepted) | OWN_KEYWORDS
    ours = {name: value for name, value in keywords.items() if name in known and name not in variables - OWN_KEYWORDS}
    free = {name: value for name, value in keywords.items() if name not in ours}
    template = {name: value for name, value in free.items() if name in variables - GENERATE_KEYWORDS}
    others = set(free) - set(template)
    candidates = known | GENERATE_KEYWORDS | _AREA_KEYWORDS | _OF_NEWER_TRANSFORMERS
    refused = {name for name in others - _SPECIAL_TOKENS if similar(name, candidates, _CLOSE)}
    _refuse(refused, (known | GENERATE_KEYWORDS) - {""})
    dropped = sorted(others)
    if dropped:
        logger.warning_once(f"The chat template does not read {', '.join(dropped)}: no effect.")
    return template, ours


def backbone_keywords(
    keywords: dict[str, Any], size: dict[str, int] | None, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """What the backbone's processor is called with: the caller's keywords, and tensors padded on the left by default.

    Args:
        keywords: keywords of a call that `check_keywords` let pass.
        size: size of the coarse view, None where the caller or the image processor sets it.
        saved: settings that the tokenizer was loaded with; they hold where the caller says nothing else.
    """
    groups = {group: dict(keywords.get(group, {})) for group in GROUPS}
    ours = {"padding_side", "input_data_format"}  # read from `keywords` or set below
    flat = {name: value for name, value in keywords.items() if name not in GROUPS and name not in ours}
    groups["images_kwargs"].pop("input_data_format", None)
    tensors = option(keywords, "text_kwargs", "return_tensors", default_tensors(saved))
    if not any("return_tensors" in holder for holder in (flat, flat.get("common_kwargs", {}), *groups.values())):
        flat["return_tensors"] = tensors
    if option(keywords, "text_kwargs", "padding") is None:
        flat.pop("padding", None)
        groups["text_kwargs"].pop("padding", None)
        if tensors is not None and saved.get("padding") is None:
            groups["text_kwargs"]["padding"] = True
    # left whatever the tokenizer was set to since
    groups["text_kwargs"]["padding_side"] = option(keywords, "text_kwargs", "padding_side") or "left"
    if size is not None:
        groups["images_kwargs"]["size"] = size
    return {**flat, **groups}


def default_tensors(saved: Mapping[str, Any]) -> Any:
    """The kind of tensors where a call does not say: what the tokenizer was saved with, else PyTorch's."""
    kind = saved.get("return_tensors")
    return "pt" if kind is None else kind
