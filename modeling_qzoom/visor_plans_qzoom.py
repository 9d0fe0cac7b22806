"""A configuration of VISOR as layer plans."""

import torch
from torch import Tensor

from .backbone_plans_qzoom import LayerPlan, frozen_plan, last_of, last_token_plan, without_plan
from .configuration_qzoom import QZoomConfig
from .visor_configurations_qzoom import READ, SELF, TEXT
from .zoom_branch_plans_qzoom import visual_tokens


Plans = list[LayerPlan | None]


def last_columns(valid: Tensor) -> Tensor:
    """(B, 1) column of each row's last token.

    Args:
        valid: (B, N), 0 on padding and on hidden tokens.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    return (valid.long() * columns).argmax(dim=1, keepdim=True)


def frozen_tokens(config: QZoomConfig, input_ids: Tensor, valid: Tensor) -> Tensor:
    """(B, N) bool: visual tokens, without a row's last token, which answers whatever it is.

    Args:
        valid: (B, N), 0 on padding and on hidden tokens.
    """
    frozen = visual_tokens(config, input_ids)
    return frozen.scatter(1, last_columns(valid).to(frozen.device), False)


def layer_plans(kinds: str, valid: Tensor, frozen: Tensor) -> Plans:
    """Per layer who takes part.

    Args:
        kinds: one letter a layer, see `visor_configurations_qzoom`.
        valid: (B, N), 0 on padding and on hidden tokens.
        frozen: (B, N) bool, from `frozen_tokens`.
    """
    by_kind: dict[str, LayerPlan | None] = {SELF: None}
    if READ in kinds:
        by_kind[READ] = frozen_plan(valid, frozen)
    if TEXT in kinds:
        by_kind[TEXT] = without_plan(valid, frozen)
    return [by_kind[kind] for kind in kinds]


def answering_plan(kind: str, plan: LayerPlan | None, valid: Tensor) -> LayerPlan:
    """The plan of a last layer of this kind, of which only the last token is read; its cache is the same."""
    return last_of(plan) if kind == TEXT and plan is not None else last_token_plan(valid)
