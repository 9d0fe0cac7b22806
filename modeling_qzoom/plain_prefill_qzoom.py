"""A prefill of rows that do not zoom, in which no token crosses a layer that nobody reads."""

from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_plans_qzoom import LayerPlan, last_token_plan
from .rows_qzoom import Positions
from .zoom_coarse_qzoom import lay_out, run_view
from .zoom_decisions_qzoom import plain_reports
from .zoom_model_qzoom import ZoomModel
from .zoom_prefill_qzoom import Prefill
from .zoom_request_qzoom import ZoomRequest


def plain_prefill(
    model: ZoomModel,
    request: ZoomRequest,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Positions,
    cache: DynamicCache,
) -> Prefill:
    """All layers over distinct rows, the last one for the last token alone; fills the request's reports.

    Args:
        input_ids, attention_mask: (B, N); no mask where nothing is padded.
        cache: empty; filled as by the VLM itself.
    """
    view = lay_out(model, input_ids, attention_mask, request.encoder_outputs, positions, cache)
    layers = len(model.vlm.get_decoder().layers)
    plans: list[LayerPlan | None] = [None] * (layers - 1) + [last_token_plan(view.valid)]
    request.reports.extend(plain_reports(model.config, input_ids, "off"))
    return Prefill(run_view(model, view, 0, layers, plans)[:, -1])
