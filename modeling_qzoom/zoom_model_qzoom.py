"""What the zooming path needs of a model."""

from collections.abc import Iterator
from typing import Protocol

from torch import nn
from transformers.generation import GenerationConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration_qzoom import QZoomConfig
from .visor_router_qzoom import Visor
from .zoom_branches_qzoom import ZoomBranches


class ZoomModel(Protocol):
    """A VLM with zoom branches, such as `QZoomForConditionalGeneration`.

    Attributes:
        config: configuration of the whole model.
        vlm: the wrapped VLM, an unchanged class of transformers.
        zoom: the branches.
        visor: the router of VISOR, None without one.
        generation_config: defaults of `generate`.
    """

    config: QZoomConfig
    vlm: PreTrainedModel
    zoom: ZoomBranches
    visor: Visor | None
    generation_config: GenerationConfig | None

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the vocabulary."""

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, (…, D) → (…, vocabulary)."""

    def modules(self) -> Iterator[nn.Module]:
        """The model and all that it is made of."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The same with their names."""
