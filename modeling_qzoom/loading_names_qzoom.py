"""Names of weights in checkpoints: `save_pretrained` may write others than a model's own, those of an older layout."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import PreTrainedModel


# what the names of weights begin with that no plain VLM has: branches, and the router of VISOR
OWN_WEIGHTS = ("zoom.", "visor.")


def with_own_names(model: PreTrainedModel, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights under the names that the model itself has for them, as `from_pretrained` would find them.

    Args:
        state_dict: all weights of a checkpoint, or some.

    Returns:
        The argument itself where it needs no renaming. A name that stays unknown, or whose place is taken, is kept.
    """
    own = model.state_dict().keys()
    foreign = [name for name in state_dict if name not in own]
    if not foreign:
        return state_dict
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    names = {}
    for name in foreign:
        renamed, converter = rename_source_key(name, renamings, converters)
        if converter is None and renamed in own and renamed not in state_dict:
            names[name] = renamed
    renamed_dict = OrderedDict((names.get(name, name), value) for name, value in state_dict.items())
    if hasattr(state_dict, "_metadata"):  # versions of the modules, which torch keeps beside the weights
        renamed_dict._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return renamed_dict
