"""What tests ask of a family."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig

from modeling_qzoom import QZoomProcessor
from modeling_qzoom.backbones_qzoom import BACKBONES, BackboneSpec


Grid = tuple[int, int]

# text configuration of every tiny model
TINY_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


class Family(ABC):
    """A family's tiny stand-ins.

    Attributes:
        name: its `model_type`.
        patch: side of a patch in pixels.
        fixed_grid: (height, width) in tokens of every image; None where images keep their own.
        image_token: text of one image token.
        vision_modules: modules of the plain VLM that see pixels; too small for 4-bit kernels in the tiny model.
        has_official_gate: whether the authors' checkpoints of the family hold a gate.
        takes_videos: whether the family's processor takes videos.
        two_layouts: whether older checkpoints of the family name their weights in another way.
    """

    name: ClassVar[str]
    patch: ClassVar[int]
    fixed_grid: ClassVar[Grid | None] = None
    image_token: ClassVar[str]
    vision_modules: ClassVar[list[str]]
    has_official_gate: ClassVar[bool] = True
    takes_videos: ClassVar[bool] = True
    two_layouts: ClassVar[bool] = True

    @property
    def spec(self) -> BackboneSpec:
        """The library's row."""
        return BACKBONES[self.name]

    @property
    def has_budget(self) -> bool:
        """Whether a number of tokens can be asked for."""
        return self.spec.grid.has_budget

    @property
    def markers(self) -> int:
        """How many tokens stand around an image."""
        return 0 if self.spec.image_start_token is None else 2

    def budget(self, min_tokens: int = 4, max_tokens: int = 24) -> dict[str, int]:
        """A budget as keywords; nothing where the family takes none."""
        return {"min_tokens": min_tokens, "max_tokens": max_tokens} if self.has_budget else {}

    def grids(self, *grids: Grid) -> list[Grid]:
        """The grids that images have which are asked for with these."""
        return list(grids) if self.fixed_grid is None else [self.fixed_grid] * len(grids)

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte tokenizer with the family's special tokens and a chat template."""

    @abstractmethod
    def config(self, layers: int = 6) -> PreTrainedConfig:
        """A configuration with real structure and small sizes."""

    @abstractmethod
    def processor(self, **kwargs: Any) -> QZoomProcessor:
        """Our processor around the tiny tokenizer."""

    @abstractmethod
    def draw_image(self, grids: Iterator[Grid], seed: int, generator: torch.Generator) -> dict[str, Any]:
        """One image of a prompt.

        Args:
            grids: (height, width) in tokens of the images to come; not read where the grid is fixed.
            seed: of the source image.
            generator: of the pixel values.

        Returns:
            `text`, `pixel_values`, `source`, and `image_grid_thw` where the family has grids.
        """

    def finish_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Adds what the processor makes of the ids."""
        return inputs

    def video_text(self, frames: int, tokens: int) -> str:
        """A video of so many frames with so many tokens each, as the processor writes it."""
        raise NotImplementedError(f"{self.name} takes no videos")
