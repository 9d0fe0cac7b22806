"""Which model has computed something, and in which state: whether a later call would compute the same."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .zoom_model_qzoom import ZoomModel


@dataclass(frozen=True)
class ModelState:
    """A model at one moment, told by what is cheap to see.

    Attributes:
        model: the model itself.
        dtype: of its embeddings.
        changes: how often torch has changed its weights in place, as optimizers and `load_state_dict` do.
        adapters: which adapters of peft are active in which layers.
    """

    model: "weakref.ref[Any]"
    dtype: torch.dtype | None
    changes: int
    adapters: tuple[str, ...]

    @classmethod
    def of(cls, model: ZoomModel) -> "ModelState":
        """The state that a model is in."""
        return cls(weakref.ref(model), _dtype(model.get_input_embeddings()), _changes(model), _adapters(model))

    def difference(self, model: ZoomModel) -> str | None:
        """What has become different, as the end of a sentence; None if nothing has."""
        now = ModelState.of(model)
        if self.model() is not model:
            return "another model"
        if self.dtype != now.dtype:
            return f"this model in {self.dtype}, which runs in {now.dtype} now"
        if self.adapters != now.adapters:
            return "this model with other adapters than those that are active now"
        if self.changes != now.changes:
            return "this model before its weights were changed"
        return None


def _changes(model: Any) -> int:
    """Changes in place of all weights that are here: offloaded ones come and go, and those of inference mode have no
    count."""
    return sum(weight._version for weight in model.parameters() if not (weight.is_meta or weight.is_inference()))


def _dtype(embeddings: nn.Module) -> torch.dtype | None:
    weight = next(embeddings.parameters(), None)
    return None if weight is None else weight.dtype


def _adapters(model: ZoomModel) -> tuple[str, ...]:
    """Name, active adapters and whether they are switched off, of every layer that peft has wrapped."""
    return tuple(
        f"{name}: {module._active_adapter} {module._disable_adapters}"
        for name, module in model.named_modules()
        if hasattr(type(module), "_active_adapter")
    )
