"""The training pass of VISOR's router in `forward`: which configuration each row needs, by cross-entropy.

Layers above the router's do not run.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .errors_qzoom import InputError, UnsupportedError
from .training_losses_qzoom import IGNORED, unused_above, with_unused
from .visor_configurations_qzoom import SELF, layer_kinds
from .visor_plans_qzoom import frozen_tokens, last_columns, layer_plans
from .zoom_coarse_qzoom import coarse_view, run_view
from .zoom_model_qzoom import ZoomModel


def check_routing_call(given: dict[str, Any]) -> None:
    """Refuses what a pass over the router would not obey.

    Args:
        given: the other arguments of `forward` that ask for another pass, by name.

    Raises:
        InputError: names those that are there.
    """
    others = sorted(name for name, value in given.items() if value is not None)
    if others:
        raise InputError(f"route_targets train the router alone: leave {others} out.")


def route_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over rows whose target is not -100; zero, with gradient, when there are none.

    Args:
        logits: (B, choices).
        targets: (B,) places of the right choices.

    Raises:
        InputError: the targets are no such places.
    """
    if targets.shape != logits.shape[:1]:
        raise InputError(
            f"route_targets must be one number per row, ({len(logits)},), got shape {tuple(targets.shape)}."
        )
    choices, keep = logits.shape[1], targets != IGNORED
    if targets.is_floating_point() or not ((targets >= 0) & (targets < choices) | ~keep).all():
        raise InputError(
            f"route_targets must be whole numbers, places of the router's {choices} choices or -100 (ignored); others "
            "were given."
        )
    if not keep.any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits[keep], targets[keep].long())


def routing_pass(
    model: ZoomModel, input_ids: Tensor, attention_mask: Tensor | None, visual: dict[str, Any], targets: Tensor
) -> dict[str, Any]:
    """`loss`, which is `route_loss`, and (B, choices) float32 `route_logits`; arguments as in `forward`.

    Each row's last token is asked, as `generate` asks it, so rows hold prompts without answers.

    Raises:
        UnsupportedError: the model has no router.
        InputError: the targets do not fit.
    """
    visor, decoder = model.config.visor, model.vlm.get_decoder()
    if model.visor is None or visor is None:
        raise UnsupportedError("route_targets were given, but this model has no router (config.visor names none).")
    layer, choices = visor["router"]["layer"], visor["router"]["choices"]
    view = coarse_view(model, input_ids, attention_mask, visual)
    kinds = layer_kinds(visor, choices[0]) or SELF * len(decoder.layers)
    plans = layer_plans(kinds[:layer], view.valid, frozen_tokens(model.config, input_ids, view.valid))
    hidden = run_view(model, view, 0, layer, plans)
    last = last_columns(view.valid).to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
    logits = model.visor.router(hidden.gather(1, last)[:, 0])
    unused = unused_above(model, view, layer, [model.zoom])
    loss = with_unused(route_loss(logits, targets.to(logits.device)), unused)
    return {"loss": loss, "route_loss": loss, "route_logits": logits}
