"""Fresh branches and routers, one at a time, so that the others stay as they are."""

import copy
from typing import Any

from torch import nn

from ... import QZoomForConditionalGeneration
from ...loading_qzoom import start_gate, start_region
from ...visor_router_qzoom import visor_of
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


def _layers(model: QZoomForConditionalGeneration) -> list[nn.Module]:
    """Decoder layers K … K+T-1, which branches are copied from."""
    layers, first = model.vlm.get_decoder().layers, model.config.branch_layer
    return [_without_lora(layers[first + index]) for index in range(model.config.branch_depth)]


def reset_region(model: QZoomForConditionalGeneration) -> None:
    """Start the region branch from decoder layers K … K+T-1 (paper III-C)."""
    start_region(model.zoom.region, _layers(model), model.vlm.get_decoder().norm)


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
    start_gate(check_gate(model), _layers(model), model.config.get_text_config().initializer_range)


def reset_router(model: QZoomForConditionalGeneration, router: dict[str, Any]) -> None:
    """Give the model a fresh router of VISOR, in place of its own where it has one.

    Args:
        router: its layer and choices, as `QZoomConfig.visor` has them.

    Raises:
        ValueError: the model has no such configurations, or they differ below the layer.
    """
    config, embedding = model.config, next(model.get_input_embeddings().parameters())
    config.visor = {**(config.visor or {"configurations": {}}), "router": router}
    config.check_fields()
    fresh = visor_of(config, model.get_decoder())
    assert fresh is not None
    model.visor = fresh.to(embedding.device, embedding.dtype)
