"""Fresh branches: copies of the backbone's layers, one branch at a time, so that the other one stays as it is."""

import copy
from types import SimpleNamespace
from typing import Any

from torch import nn

from ... import QZoomForConditionalGeneration
from ...loading_quantized_qzoom import dense_state
from ...loading_qzoom import copy_branches_from_decoder
from ...zoom_branches_qzoom import GateBranch


def _without_lora(layer: nn.Module) -> nn.Module:
    """The layer, or a copy of it with its adapter merged."""
    if not any("lora_" in name for name, _ in layer.named_parameters()):
        return layer
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(layer)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain.set_submodule(name, module.get_base_layer())
    return plain


def _decoder(model: QZoomForConditionalGeneration) -> Any:
    """What branches are copied from: the decoder's layers from K on."""
    decoder, first = model.vlm.get_decoder(), model.config.branch_layer
    layers = [_without_lora(decoder.layers[first + index]) for index in range(model.config.branch_depth)]
    return SimpleNamespace(layers=layers, norm=decoder.norm)


def reset_region(model: QZoomForConditionalGeneration) -> None:
    """Start the region branch from decoder layers K … K+T-1 (paper III-C)."""
    branch: Any = SimpleNamespace(gate=None, region=model.zoom.region)
    copy_branches_from_decoder(branch, _decoder(model), 0, model.config.branch_depth)


def check_gate(model: QZoomForConditionalGeneration) -> GateBranch:
    """The model's gate.

    Raises:
        ValueError: it has none.
    """
    if model.zoom.gate is None:
        raise ValueError(
            "This checkpoint has no gate (has_gate is False in its config). Start from one with a gate: from_backbone "
            "attaches one unless it is told not to."
        )
    return model.zoom.gate


def reset_gate(model: QZoomForConditionalGeneration) -> None:
    """Start the gate from decoder layers K … K+T-1, and its head from small random weights (paper III-B)."""
    gate = check_gate(model)
    for layer, source in zip(gate.layers, _decoder(model).layers, strict=True):
        layer.load_state_dict(dense_state(source))
    nn.init.normal_(gate.head.weight, std=model.config.get_text_config().initializer_range)
    nn.init.zeros_(gate.head.bias)
