"""Who crosses the layers of a branch: every token, or text alone, with visual tokens as keys and values."""

import torch
from torch import Tensor

from .backbone_plans_qzoom import LayerPlan, asking_token_plan, frozen_plan, last_token_plan
from .configuration_qzoom import QZoomConfig
from .zoom_options_qzoom import ZoomOptions


Plans = list[LayerPlan | None]


def visual_tokens(config: QZoomConfig, input_ids: Tensor) -> Tensor:
    """(B, N) bool: the tokens of images and videos."""
    kinds = [token for token in (config.image_token_id, config.video_token_id) if token is not None]
    return torch.isin(input_ids, torch.tensor(kinds, device=input_ids.device))


def _light_plan(config: QZoomConfig, input_ids: Tensor, valid: Tensor, query_columns: Tensor | None) -> LayerPlan:
    """Visual tokens stay as they are, unless they ask: a prompt of a family without markers may end in its image."""
    frozen = visual_tokens(config, input_ids)
    if query_columns is None:
        frozen[:, -1] = False
    else:
        frozen.scatter_(1, query_columns.to(frozen.device), False)
    return frozen_plan(valid, frozen)


def gate_plans(
    config: QZoomConfig, options: ZoomOptions, input_ids: Tensor, valid: Tensor, query_columns: Tensor | None
) -> Plans | None:
    """Plans of the gate's T layers.

    Args:
        input_ids, valid: (B, N) of the rows that it reads.
        query_columns: (B, 1) column that is read of the last layer; None for the last one.

    Returns:
        None where every layer updates every token.
    """
    depth = config.branch_depth
    inner: LayerPlan | None = None
    if options.gate_branch == "light":
        inner = _light_plan(config, input_ids, valid, query_columns)
    last = inner
    if options.skips_unread:
        last = last_token_plan(valid) if query_columns is None else asking_token_plan(valid, query_columns)
    return _plans([inner] * (depth - 1) + [last])


def region_plans(
    config: QZoomConfig, options: ZoomOptions, input_ids: Tensor, valid: Tensor, query_columns: Tensor | None
) -> Plans | None:
    """Plans of the region branch's T - 1 layers; arguments as for `gate_plans`, with (B, Q) asking columns."""
    if options.region_branch == "full":
        return None
    return _plans([_light_plan(config, input_ids, valid, query_columns)] * (config.branch_depth - 1))


def _plans(plans: Plans) -> Plans | None:
    return None if all(plan is None for plan in plans) else plans
