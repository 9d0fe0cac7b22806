"""The coarse pass: the whole prompt through decoder layers [0, K), for `generate`, `forward` and label making."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .backbone_layers_qzoom import Mask, causal_mask, mask_behind, rotary, run_layers
from .backbone_plans_qzoom import LayerPlan
from .backbone_projections_qzoom import Rotary
from .prompt_checks_qzoom import check_ids, check_prompt
from .prompt_qzoom import (
    POSITION_INPUTS,
    DeepStack,
    VisualFeatures,
    as_visual_features,
    embed_prompt,
    encode_images,
    prompt_positions,
)
from .rows_qzoom import Positions, pick
from .zoom_model_qzoom import ZoomModel
from .zoom_pages_qzoom import Known


@dataclass(frozen=True)
class CoarseView:
    """A batch of prompts on its way through the lower decoder layers.

    Attributes:
        input_ids, valid: (B, N); `valid` is 0 on padding and on tokens that a prompt's own mask hides.
        positions: positions of all tokens.
        position_embeddings: cos and sin, each (B, N, head_dim).
        mask: the causal mask of the columns that run.
        embeds: (B, N, D) inputs of layer 0.
        deepstack: features that the first layers add to the embeddings.
        hidden: (B, N, D) inputs of layer K; of layer 0 before the pass.
        cache: receives keys and values of the layers that run; None in training passes.
        known: what the rows know of their first columns, which no layer runs again; None for nothing.
    """

    input_ids: Tensor
    valid: Tensor
    positions: Positions
    position_embeddings: Rotary
    mask: Mask
    embeds: Tensor
    deepstack: DeepStack | None
    hidden: Tensor
    cache: DynamicCache | None = None
    known: Known | None = None

    @property
    def start(self) -> int:
        """The first column that runs; those in front of it are known."""
        return 0 if self.known is None else self.known.end


def lay_out(
    model: ZoomModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    encoded: dict[str, VisualFeatures],
    positions: Positions,
    cache: DynamicCache | None = None,
    known: Known | None = None,
) -> CoarseView:
    """A batch of prompts in front of layer 0.

    Args:
        input_ids, attention_mask: (B, N); no mask where nothing is hidden.
        encoded: features of the prompts' images and videos by kind, "image" and "video".
        cache: empty; the layers fill it.
        known: what the rows know of their first columns.
    """
    decoder = model.vlm.get_decoder()
    embeds, deepstack = embed_prompt(model.vlm, input_ids, encoded.get("image"), encoded.get("video"))
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if known is None:
        mask = causal_mask(decoder, embeds, attention_mask, cache)
    else:
        mask = mask_behind(decoder.config, embeds[:, known.end :], valid, known.end)
    return CoarseView(
        input_ids,
        valid=valid,
        positions=positions,
        position_embeddings=rotary(decoder, embeds, positions.for_decoder()),
        mask=mask,
        embeds=embeds,
        deepstack=deepstack,
        hidden=embeds,
        cache=cache,
        known=known,
    )


def coarse_view(
    model: ZoomModel, input_ids: Tensor, attention_mask: Tensor | None, vision: dict[str, Any]
) -> CoarseView:
    """A batch of prompts in front of layer 0, from the arguments of `forward`.

    Args:
        input_ids, attention_mask: (B, N), padded on either side.
        vision: the VLM's visual inputs by name.

    Raises:
        InputError: the inputs do not fit each other.
    """
    vlm = model.vlm
    check_ids(input_ids, getattr(model.get_input_embeddings(), "num_embeddings", None))
    check_prompt(model.config, input_ids, attention_mask, vision)
    encoded = {kind: as_visual_features(output) for kind, output in vision.get("mm_encoder_outputs", {}).items()}
    if "pixel_values" in vision:
        encoded["image"] = encode_images(vlm, vision["pixel_values"], vision.get("image_grid_thw"))
    if "pixel_values_videos" in vision:
        videos = vlm.get_video_features(vision["pixel_values_videos"], vision["video_grid_thw"], return_dict=True)
        encoded["video"] = as_visual_features(videos)
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    grids = {key: vision[key] for key in POSITION_INPUTS if key in vision}
    positions = prompt_positions(vlm, model.config.backbone, input_ids, valid, **grids)
    return lay_out(model, input_ids, valid, encoded, Positions.of(positions))


def run_view(
    model: ZoomModel, view: CoarseView, first: int, last: int, plans: Sequence[LayerPlan | None] | None = None
) -> Tensor:
    """Decoder layers [first, last) over the columns of a view that are not known; `plans` as for `run_layers`.

    Args:
        view: its cache holds keys and values of the known columns in these layers.

    Returns:
        (B, N - start, D) inputs of layer `last`.
    """
    start, length = view.start, view.hidden.shape[1]
    cos, sin = (part[:, start:] for part in view.position_embeddings)
    deepstack = view.deepstack
    if deepstack is not None and start:
        deepstack = deepstack.select(range(len(view.hidden)), length - start)
    return run_layers(
        model.vlm.get_decoder(),
        view.hidden[:, start:],
        first,
        last,
        mask=view.mask,
        position_embeddings=(cos, sin),
        cache=view.cache,
        deepstack=deepstack,
        plans=plans,
        cached=view.valid[:, :start],
    )


def run_to_branch(model: ZoomModel, view: CoarseView) -> CoarseView:
    """Decoder layers [0, K); the layers above do not run."""
    layer_k = model.config.branch_layer
    if view.known is None:
        return replace(view, hidden=run_view(model, view, 0, layer_k))
    assert view.cache is not None
    layers, device = model.vlm.get_decoder().layers[:layer_k], view.hidden.device
    view.known.fill(view.cache, layers, lambda page: page.lower, device)
    hidden = run_view(model, view, 0, layer_k)
    return replace(view, hidden=torch.cat([view.known.join(lambda page: page.hidden, hidden.device), hidden], dim=1))


def rows_length(view: CoarseView, rows: list[int]) -> int:
    """Columns of the longest of some rows, from its first token on; tokens hidden inside a prompt count."""
    valid = pick(view.valid, rows)
    return valid.shape[1] - int(valid.argmax(1).min())


def pick_rows(model: ZoomModel, view: CoarseView, rows: list[int], length: int, cache: DynamicCache) -> CoarseView:
    """The last columns of some rows, in ascending order, between two layers.

    Args:
        length: number of columns, at least `rows_length`.
        cache: keys and values of these rows in the layers that have run.
    """
    decoder = model.vlm.get_decoder()
    valid, hidden = pick(view.valid, rows)[:, -length:], pick(view.hidden, rows)[:, -length:]
    cos, sin = (pick(part, rows)[:, -length:] for part in view.position_embeddings)
    known = None if view.known is None else view.known.pick(rows).trim(view.valid.shape[1] - length)
    if known is None:
        mask = causal_mask(decoder, hidden, valid, None)
    else:
        mask = mask_behind(decoder.config, hidden[:, known.end :], valid, known.end)
    return CoarseView(
        pick(view.input_ids, rows)[:, -length:],
        valid=valid,
        positions=view.positions.pick(rows).last(length),
        position_embeddings=(cos, sin),
        mask=mask,
        embeds=pick(view.embeds, rows)[:, -length:],
        deepstack=None if view.deepstack is None else view.deepstack.select(rows, length),
        hidden=hidden,
        cache=cache,
        known=known,
    )
