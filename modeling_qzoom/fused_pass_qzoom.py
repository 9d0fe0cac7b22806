"""The second pass over rows that zoom (paper III-C, eq. 8 and 9): keys, values and hidden states of the prefix are
reused below layer K, only crop and suffix are computed there, and layers K … L see the whole fused sequence once."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from .adapters_qzoom import run_rows
from .backbones_qzoom import VisualFeatures, encode_images, spec_for_config
from .configuration_qzoom import QZoomConfig
from .decisions_qzoom import CoarseView, Crop
from .fusion_qzoom import FusedRow, fuse_row, length_mask, pad_left, stack_positions
from .layers_qzoom import DeepStack, causal_mask, layer_states, rotary, run_layers, set_layer_states
from .requests_qzoom import ZoomRequest


def marker_ids(config: QZoomConfig) -> tuple[int, int] | None:
    """Ids of the tokens before and after an image, where the family has them."""
    spec = spec_for_config(config.vlm_config)
    if spec.image_start_token is None or spec.image_end_token is None:
        return None
    return getattr(config.vlm_config, spec.image_start_token), getattr(config.vlm_config, spec.image_end_token)


def encode_crops(vlm: PreTrainedModel, crops: list[Crop], device: torch.device) -> VisualFeatures:
    """One pass of the vision tower over all crops."""
    pixel_values = torch.cat([crop.pixel_values for crop in crops]).to(device)
    has_grid = crops[0].grid is not None
    grids = torch.tensor([crop.grid for crop in crops], device=device) if has_grid else None
    return encode_images(vlm, pixel_values, grids)


def plan_rows(model: PreTrainedModel, request: ZoomRequest, view: CoarseView, crops: list[Crop]) -> list[FusedRow]:
    """The fused sequence of every zooming row."""
    spec = spec_for_config(model.config.vlm_config)
    alignment = request.options.position_alignment or ("continuous" if spec.mrope else "sequential")
    markers = marker_ids(model.config)
    return [
        fuse_row(
            crop.row,
            view.input_ids[crop.row],
            view.valid[crop.row],
            view.positions[..., crop.row, :],
            crop.span,
            crop.cells,
            crop.token_grid,
            alignment=alignment,
            markers=markers,
        )
        for crop in crops
    ]


def _inserted_embeds(model: PreTrainedModel, row: FusedRow, crop_embeds: Tensor, like: Tensor) -> Tensor:
    """(block, D): the crop's tokens between their markers."""
    crop_embeds = crop_embeds.to(like.device, like.dtype)
    if not row.has_markers:
        return crop_embeds
    ids = torch.tensor([marker_ids(model.config)], device=like.device)
    before, after = model.vlm.get_input_embeddings()(ids)[0].to(like.device)
    return torch.cat([before[None], crop_embeds, after[None]])


def fused_embeds(
    model: PreTrainedModel, view: CoarseView, row: FusedRow, crop_embeds: Tensor, *, full: bool
) -> Tensor:
    """(n, D) inputs of layer 0 for the inserted block and the suffix; `full` puts the prefix in front."""
    inserted = _inserted_embeds(model, row, crop_embeds, view.embeds)
    prefix = [view.embeds[row.row, row.prefix]] if full else []
    return torch.cat([*prefix, inserted, view.embeds[row.row, row.suffix]])


def fused_deepstack(
    view: CoarseView, rows: list[FusedRow], features: VisualFeatures, length: int, *, full: bool
) -> DeepStack | None:
    """DeepStack features of fused rows.

    Args:
        features: the crops, one per row (empty tensors for a row without).
        length: rows are left-padded to it.
        full: include the prefix.
    """
    if view.deepstack is None:
        return None
    coarse_mask = view.deepstack.mask
    coarse_index = (coarse_mask.flatten().cumsum(0) - 1).view_as(coarse_mask)  # row of a level's tensor by token
    masks, picks = [], []
    for row in rows:
        prompt_mask, prompt_index = coarse_mask[row.row], coarse_index[row.row]
        before = row.prefix if full else row.prefix[:0]
        inserted = torch.zeros(row.block, dtype=torch.bool, device=coarse_mask.device)
        margin = (row.block - row.crop) // 2
        inserted[margin : margin + row.crop] = True
        masks.append(torch.cat([prompt_mask[before], inserted, prompt_mask[row.suffix]]))
        picks.append(tuple(prompt_index[part[prompt_mask[part]]] for part in (before, row.suffix)))
    levels = []
    for coarse, crop_level in zip(view.deepstack.levels, features.deepstack):
        parts = []
        for (before, after), inserted in zip(picks, crop_level):
            parts += [coarse[before.to(coarse.device)], inserted.to(coarse), coarse[after.to(coarse.device)]]
        levels.append(torch.cat(parts))
    return DeepStack(levels, pad_left(masks, length))


def _gather_columns(states: Tensor, columns: Tensor) -> Tensor:
    """(B, heads, n, d) at per-row (B, m) columns → (B, heads, m, d)."""
    columns = columns.to(states.device)
    index = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)


def fused_prefill(
    model: PreTrainedModel, request: ZoomRequest, view: CoarseView, crops: list[Crop], cache: DynamicCache
) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
    """Steps 6 and 7.

    Args:
        cache: keys and values of the coarse pass in layers [0, K); not changed.

    Returns:
        (b, D) last hidden states before the final norm, the rows' cache, their positions (…, b, F) float32 and their
        (b, F) mask. Rows are left-padded to F, the longest fused sequence.
    """
    vlm, decoder = model.vlm, model.vlm.get_decoder()
    layer_k, last_layer = model.config.branch_layer, len(decoder.layers)
    device = view.embeds.device
    features = encode_crops(vlm, crops, device)
    rows = plan_rows(model, request, view, crops)

    prefix_length = max(len(row.prefix) for row in rows)
    chunk_length = max(row.length - len(row.prefix) for row in rows)
    prefix_columns = pad_left([row.prefix for row in rows], prefix_length)  # (b, P)
    # a hole of padding may open between a row's prefix and its chunk
    present = torch.cat(
        [
            length_mask([len(row.prefix) for row in rows], prefix_length, device),
            length_mask([row.length - len(row.prefix) for row in rows], chunk_length, device),
        ],
        dim=1,
    )  # (b, P + C)
    mask = torch.cat(
        [
            pad_left([row.mask[: len(row.prefix)] for row in rows], prefix_length),
            pad_left([row.mask[len(row.prefix) :] for row in rows], chunk_length),
        ],
        dim=1,
    ).to(device)  # (b, P + C), 0 also where a prompt hides a token
    fused_cache = DynamicCache(config=decoder.config)
    index = torch.tensor([crop.row for crop in crops])
    for layer in range(layer_k):
        keys, values = (
            _gather_columns(states[index.to(states.device)], prefix_columns) for states in layer_states(cache, layer)
        )
        set_layer_states(fused_cache, layer, keys, values)

    chunks = []
    for row, crop_embeds in zip(rows, features.embeds):
        with run_rows(request.adapters, [row.row]):
            chunks.append(fused_embeds(model, view, row, crop_embeds, full=False))
    chunk = pad_left(chunks, chunk_length)  # (b, C, D)
    chunk_positions = stack_positions([row.positions[..., len(row.prefix) :] for row in rows], chunk_length)
    chunk_mask = causal_mask(decoder, chunk, mask, fused_cache)
    inserted_at = [(len(row.suffix), row.block) for row in rows]
    with run_rows(request.adapters, [row.row for row in rows], inserted_at):
        chunk = run_layers(
            decoder,
            chunk,
            0,
            layer_k,
            mask=chunk_mask,
            position_embeddings=rotary(decoder, chunk, chunk_positions),
            cache=fused_cache,
            deepstack=fused_deepstack(view, rows, features, chunk_length, full=False),
        )

    # close the holes of padding: from here on every row is contiguous and left-padded
    length = max(row.length for row in rows)
    hidden = pad_left(
        [
            torch.cat([view.hidden[row.row, row.prefix], chunk[slot, chunk_length - (row.length - len(row.prefix)) :]])
            for slot, row in enumerate(rows)
        ],
        length,
    )  # (b, F, D)
    if length < prefix_length + chunk_length or not bool(present.all()):
        columns = pad_left([row_present.nonzero()[:, 0] for row_present in present], length)  # (b, F)
        for layer in range(layer_k):
            keys, values = (_gather_columns(states, columns) for states in layer_states(fused_cache, layer))
            set_layer_states(fused_cache, layer, keys, values)
    mask = pad_left([row.mask for row in rows], length).to(device)
    positions = stack_positions([row.positions for row in rows], length)
    levels = 0 if view.deepstack is None else len(view.deepstack.levels)
    with run_rows(request.adapters, [row.row for row in rows], inserted_at):
        hidden = run_layers(
            decoder,
            hidden,
            layer_k,
            last_layer,
            mask=causal_mask(decoder, hidden, mask, None),
            position_embeddings=rotary(decoder, hidden, positions),
            cache=fused_cache,
            deepstack=fused_deepstack(view, rows, features, length, full=True) if levels > layer_k else None,
        )
    return hidden[:, -1], fused_cache, positions, mask
