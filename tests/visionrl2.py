"""What the code of Vision-RL² made of region logits: heat map, box, pixel box and the size of a dense crop."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


FOLDER = Path(__file__).parent / "fixtures" / "visionrl2"
CASES = (*(f"vrl2_qwen2_5_vl_{letter}" for letter in "abcf"), "vrl2_qwen3_5_a", "vrl2_qwen3_5_b")


@dataclass
class RegionCase:
    """One case.

    Attributes:
        settings: `case.json`.
        expected: what the authors' code computed; `fixtures/README.md` lists it.
    """

    settings: dict[str, Any]
    expected: dict[str, Tensor]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the source in pixels."""
        height, width = self.settings["image_size"]
        return height, width

    @property
    def token_side(self) -> int:
        """Side of a merged token in pixels."""
        return 2 * self.settings["patch_size"]

    @property
    def source_tokens(self) -> int:
        """The coarse view's limit in merged tokens."""
        return self.settings["max_pixels"] // self.token_side**2

    def values(self, name: str) -> list[int]:
        """A recorded vector as Python numbers."""
        return self.expected[name].tolist()


def load_case(name: str) -> RegionCase:
    folder = FOLDER / name
    return RegionCase(json.loads((folder / "case.json").read_text()), load_file(folder / "expected.safetensors"))
