"""The golden cases: inputs and outputs of the authors' code, and their checkpoints rebuilt in the authors' format.

The checkpoints hold full-precision normal variates that compress no further. They were drawn from one seeded Mersenne
Twister, whose stream NumPy has frozen for `RandomState`; so `weights.json` stores where each tensor starts in that
stream, its mean and its scale, and the values come out as they were up to the last float32 digit.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor


FOLDER = Path(__file__).parent / "fixtures" / "golden"
CASES = tuple(f"{family}_{letter}" for family in ("qwen2_5_vl", "qwen3_vl") for letter in "abc")
COPIED = ("config.json", "preprocessor_config.json")


def normal_stream(seed: int, count: int) -> np.ndarray:
    """(count,) uint32 words of the Mersenne Twister, from which `normals` makes variates."""
    return np.frombuffer(np.random.RandomState(seed).bytes(4 * count), dtype="<u4")


def normals(words: np.ndarray) -> np.ndarray:
    """(n,) words → (n,) float32 variates, n a multiple of 16: Box-Muller in blocks of 16, the first 8 words give the
    radii and the last 8 the angles."""
    uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    radius, angle = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - radius))
    angle = np.float32(2 * math.pi) * angle
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def rebuild_weights(recipe: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a `weights.json`.

    Raises:
        ValueError: they are not what was stored; the fixture is damaged or NumPy's stream has changed.
    """
    words = normal_stream(recipe["seed"], max(entry["start"] + math.prod(entry["shape"]) for entry in recipe["drawn"]))
    weights = {name: torch.tensor(values) for name, values in recipe["stored"].items()}
    for entry in recipe["drawn"]:
        drawn = normals(words[entry["start"] : entry["start"] + math.prod(entry["shape"])])
        values = np.float32(entry["mean"]) + np.float32(entry["scale"]) * drawn
        weights[entry["name"]] = torch.from_numpy(values).reshape(entry["shape"])
    total = sum(tensor.double().abs().sum().item() for tensor in weights.values())
    if not math.isclose(total, recipe["absolute_sum"], rel_tol=1e-7):
        raise ValueError(f"the golden weights sum up to {total}, not to {recipe['absolute_sum']}.")
    return weights


@dataclass
class GoldenCase:
    """One case.

    Attributes:
        name: folder under `fixtures/golden`.
        settings: `case.json`.
        expected: what the authors' code computed, by `<run>.<name>`; see the README beside the cases.
        source: (3, H, W) uint8, the image.
        coarse_pixels, crop_pixels: (n, 3 · 2 · patch²) float32, the patches that the authors' code fed.
    """

    name: str
    settings: dict[str, Any]
    expected: dict[str, Tensor]
    source: Tensor
    coarse_pixels: Tensor
    crop_pixels: Tensor

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.source.permute(1, 2, 0).numpy())

    def write_checkpoint(self, folder: Path) -> Path:
        """Writes the checkpoint in the authors' format; returns the folder."""
        folder.mkdir(parents=True)
        recipe = json.loads((FOLDER / self.name / "weights.json").read_text())
        save_file(rebuild_weights(recipe), folder / "model.safetensors", {"format": "pt"})
        for name in COPIED:
            (folder / name).write_text((FOLDER / self.name / name).read_text())
        return folder

    def inputs(self, image_token_id: int) -> dict[str, Any]:
        """The request as a processor would make it."""
        ids = self.expected["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == image_token_id).int(),
            "pixel_values": self.coarse_pixels,
            "image_grid_thw": self.expected["image_grid_thw"],
            "source_images": [self.source],
        }


def _pixels(file: Path) -> Tensor:
    """(H, W, 3) uint8."""
    return torch.from_numpy(np.array(Image.open(file).convert("RGB")))


def patches(view: Tensor, settings: dict[str, Any]) -> Tensor:
    """An image in the network's resolution as normalised patches.

    Args:
        view: (h, w, 3) uint8.

    Returns:
        (n, 3 · 2 · patch²) float32, ordered by 2 × 2 tokens, both frames of a patch alike.
    """
    patch = settings["patch_size"]
    mean, std = (torch.tensor(settings[name]) for name in ("image_mean", "image_std"))
    normalized = (view / 255 - mean) / std
    rows, columns = view.shape[0] // patch, view.shape[1] // patch
    blocks = normalized.view(rows // 2, 2, patch, columns // 2, 2, patch, 3).permute(0, 3, 1, 4, 6, 2, 5)
    blocks = blocks.reshape(rows * columns, 3, 1, patch, patch).expand(-1, -1, 2, -1, -1)
    return blocks.reshape(rows * columns, -1)


def load_case(name: str) -> GoldenCase:
    folder = FOLDER / name
    settings = json.loads((folder / "case.json").read_text())
    return GoldenCase(
        name,
        settings,
        load_file(folder / "expected.safetensors"),
        _pixels(FOLDER / settings["image"]).permute(2, 0, 1).contiguous(),
        patches(_pixels(folder / "coarse.png"), settings),
        patches(_pixels(folder / "crop.png"), settings),
    )
