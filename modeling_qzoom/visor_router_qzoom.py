"""VISOR's router: which configuration a row needs, read from its last prompt token before the layers that differ.

Width, token and place are this project's own choice; the paper's are not public.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .configuration_qzoom import QZoomConfig


class VisorRouter(nn.Module):
    """The backbone's norm and two linear layers: one logit a configuration."""

    def __init__(self, decoder: PreTrainedModel, choices: int):
        super().__init__()
        width = decoder.config.hidden_size
        self.norm = type(decoder.norm)(width, eps=decoder.norm.variance_epsilon)
        self.inner = nn.Linear(width, width // 2)
        self.outer = nn.Linear(width // 2, choices)

    def forward(self, states: Tensor) -> Tensor:
        """(B, D) states of the last prompt tokens at the router's layer → (B, choices) float32 logits."""
        states = self.norm(states).to(self.inner.weight.dtype)
        return self.outer(F.gelu(self.inner(states))).float()


class Visor(nn.Module):
    """The weights that VISOR adds to a plain VLM."""

    def __init__(self, config: QZoomConfig, decoder: PreTrainedModel):
        super().__init__()
        assert config.visor is not None
        self.router = VisorRouter(decoder, len(config.visor["router"]["choices"]))


def visor_of(config: QZoomConfig, decoder: PreTrainedModel) -> Visor | None:
    """Fresh VISOR weights of a configuration, None where it asks for none."""
    has_router = config.visor is not None and config.visor.get("router") is not None
    return Visor(config, decoder) if has_router else None
