"""What `forward` refuses before it computes anything: arguments that the pass in question could not obey."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from .errors_qzoom import InputError
from .messages_qzoom import similar
from .zoom_options_qzoom import SETTING_NAMES


# the arguments of `forward` that no plain VLM has
_OWN = (
    "region_targets",
    "gate_targets",
    "query_positions",
    "source_images",
    "source_boxes",
    "zoom_boxes",
    "vision",
    "route_targets",
)
_SIMILAR = 0.85  # `gate_target` and `zoom_bboxes` are closer than that to a name of ours, `image_sizes` is not
_PASS = "a pass with region_targets, gate_targets, route_targets, vision or fused labels"


def _asks_for_something(value: Any) -> bool:
    """Whether an argument differs from one that is left out; wrappers such as peft's pass on what they do not set."""
    return value is not None and value is not False and not (isinstance(value, int) and value == 0)


def check_names(kwargs: dict[str, Any]) -> None:
    """Refuses names that the VLM, which takes any, would drop although they are meant for Q-Zoom.

    Args:
        kwargs: what `forward` got besides its named arguments.

    Raises:
        InputError: an option of `generate`, or a name close to an argument or option of ours.
    """
    for name, value in kwargs.items():
        if not _asks_for_something(value):
            continue
        close = similar(name, (*_OWN, *SETTING_NAMES), _SIMILAR)
        if close and close[0] in _OWN:
            raise InputError(f"forward has no argument {name!r}; is it a misspelt {close[0]!r}?")
        if close:
            raise InputError(
                f"{name!r} is no argument of forward: {close[0]!r} is an option of generate. A training pass takes it "
                "from model.generation_config or model.config."
            )


def check_combination(
    labels: Tensor | None, region_targets: Any, gate_targets: Any, query_positions: Any, zoom_boxes: Any
) -> None:
    """Refuses arguments that belong to another kind of pass; each is None where it is not given.

    Raises:
        InputError: targets and labels together, or an argument whose pass is not asked for.
    """
    has_targets = region_targets is not None or gate_targets is not None
    if has_targets and labels is not None:
        raise InputError(
            "labels and branch targets belong to different training stages; pass either labels, or "
            "region_targets and gate_targets."
        )
    if query_positions is not None and not has_targets:
        raise InputError("query_positions say where the branches are asked; pass region_targets or gate_targets too.")
    if zoom_boxes is not None and labels is None:
        raise InputError(
            "zoom_boxes say which crops are trained on, so forward takes them with labels only; to look at an "
            "answer with a crop, call generate."
        )


def check_training_call(
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    inputs_embeds: Tensor | None,
    use_cache: bool | None,
    logits_to_keep: int | Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """Refuses what a training pass would drop without a word.

    Returns:
        The ids.

    Raises:
        InputError: names the arguments, or says that there are no ids.
    """
    given = {
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        "logits_to_keep": logits_to_keep,
        **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},  # Trainer's own
    }
    refused = sorted(name for name, value in given.items() if _asks_for_something(value))
    if refused:
        raise InputError(
            f"{_PASS} does not take {refused}: it makes positions and embeddings itself, keeps no cache, and returns "
            "losses and logits only. Check for a misspelt argument."
        )
    if input_ids is None:
        raise InputError(f"{_PASS} needs input_ids.")
    return input_ids
