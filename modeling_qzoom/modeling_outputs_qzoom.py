"""What `forward` returns."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass(init=False)
class QZoomOutput(CausalLMOutputWithPast):
    """What `forward` returns: the parent's fields, of which transformers chooses the cache's name, and the branches'.

    Whatever else the VLM returns (`image_outputs`, `video_outputs`, …) stands beside them under its own name.

    Args:
        loss (`torch.FloatTensor`, *optional*): language loss, or region loss + gate loss.
        logits (`torch.FloatTensor`, *optional*): (B, n, vocabulary); None in a branch pass.
        past_key_values (`Cache`, *optional*): the cache, if one was used. From transformers 5.24 on the field
            is `cache`, and this name reads it.
        hidden_states (`tuple`, *optional*): as the VLM returns them.
        attentions (`tuple`, *optional*): as the VLM returns them.
        region_loss (`torch.FloatTensor`, *optional*): BCE over labelled cells.
        gate_loss (`torch.FloatTensor`, *optional*): BCE over labelled rows.
        region_logits (`list[list[torch.FloatTensor]]`, *optional*): per row and image, (Q, h, w) float32.
        gate_logits (`torch.FloatTensor`, *optional*): (B,) float32.
        route_loss (`torch.FloatTensor`, *optional*): cross-entropy over labelled rows.
        route_logits (`torch.FloatTensor`, *optional*): (B, choices) float32.
    """

    region_loss: torch.FloatTensor | None = None
    gate_loss: torch.FloatTensor | None = None
    region_logits: list[list[torch.FloatTensor]] | None = None
    gate_logits: torch.FloatTensor | None = None
    route_loss: torch.FloatTensor | None = None
    route_logits: torch.FloatTensor | None = None

    def __init__(self, *args: Any, **values: Any) -> None:
        # any name, because DistributedDataParallel takes an output apart and builds it again
        values = {**dict(zip((field.name for field in fields(self)), args)), **values}
        parents = {"past_key_values", *(field.name for field in fields(CausalLMOutputWithPast))}
        super().__init__(**{name: value for name, value in values.items() if name in parents})
        for name, value in values.items():
            if name not in parents and value is not None:
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, with the encoders' outputs as tuples too, as the VLM returns them."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())
