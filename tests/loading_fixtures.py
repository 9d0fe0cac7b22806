"""What the tests of loading, add-ons and quantization share: folders of tiny models and answers to compare."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_qzoom import QZoomForConditionalGeneration, ZoomReport
from tests.families import FAMILY
from tests.tiny import EVERY_TOKEN, Row, make_inputs, tiny_vlm


ZOOM_CONFIG = {name: family.budget() for name, family in FAMILY.items()}
# the same weights at another address in memory may take another kernel
CLOSE = 1e-5
# modules whose widths 4-bit kernels cannot take at this size
VISION = {name: family.vision_modules for name, family in FAMILY.items()}


def plain_folder(family: str, folder: Path, **kwargs) -> str:
    """A folder with a plain VLM, as it would be on the Hub; `kwargs` of `save_pretrained`."""
    vlm = tiny_vlm(family)
    vlm.save_pretrained(folder, **kwargs)
    return str(folder)


def perturb_branches(model: QZoomForConditionalGeneration, seed: int = 1) -> QZoomForConditionalGeneration:
    """As if the branches had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.zoom.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def attach(vlm, family: str, **kwargs) -> QZoomForConditionalGeneration:
    """A model with branches of its own, always the same, on a plain VLM or its folder."""
    torch.manual_seed(0)  # the gate's head is random
    model = QZoomForConditionalGeneration.from_backbone(
        vlm, branch_layer=3, branch_depth=2, zoom_config={**EVERY_TOKEN, **ZOOM_CONFIG[family]}, **kwargs
    )
    return perturb_branches(model)


@dataclass
class Answer:
    """Logits of every step (one row), and its report."""

    logits: Tensor
    report: ZoomReport

    def difference(self, other: "Answer") -> float:
        """Largest difference of anything continuous; infinite if they looked elsewhere."""
        if self.report.box != other.report.box or self.report.zoomed != other.report.zoomed:
            return float("inf")
        pairs = [
            (self.logits, other.logits),
            (self.report.region_logits, other.report.region_logits),
            (torch.tensor(self.report.gate_probability), torch.tensor(other.report.gate_probability)),
        ]
        return max(float((left - right).abs().max()) for left, right in pairs)


def answer(model: nn.Module, family: str, **kwargs) -> Answer:
    """A zoomed answer of three tokens; the gate runs too."""
    inputs = make_inputs(family, [Row(["hello ", None, " what?"], [(4, 5)], seed=3)])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    options = {"gate_threshold": 0, "region_threshold": 0.6, "region_threshold_mode": "peak", **kwargs}
    output = model.generate(
        **inputs, **options, max_new_tokens=3, do_sample=False, output_logits=True, return_zoom_reports=True
    )
    return Answer(torch.stack(output.logits)[:, 0].float(), output.zoom_reports[0])


def weights_equal(left: nn.Module, right: nn.Module) -> bool:
    """Same names, same bits, same dtypes."""
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype for name, tensor in first.items()
    )


def weight_names(folder: str | Path) -> set[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def edit_weights(folder: str | Path, *, drop: str | None = None, add: dict[str, Tensor] | None = None) -> None:
    """Changes a saved checkpoint's file: drops what starts with `drop`, adds `add`."""
    path = Path(folder) / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    kept = {name: tensor for name, tensor in state.items() if drop is None or not name.startswith(drop)}
    assert drop is None or len(kept) < len(state)
    path.unlink()
    save_file({**kept, **(add or {})}, path, metadata={"format": "pt"})
