"""The second pass over rows that zoom (paper III-C, eq. 8 and 9): keys, values and hidden states of the prefix are
reused below layer K, only crop and suffix are computed there, and layers K … L see the whole fused sequence once."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import layer_states, set_layer_states
from .backbone_layers_qzoom import causal_mask, rotary, run_layers
from .rows_qzoom import _gather_columns, length_mask, pad_left, stack_positions
from .zoom_coarse_qzoom import CoarseView
from .zoom_crops_qzoom import encode_crops
from .zoom_fusion_qzoom import PlacedCrop, fused_deepstack, fused_embeds, plan_rows
from .zoom_request_qzoom import ZoomRequest


def fused_prefill(
    model: PreTrainedModel, request: ZoomRequest, view: CoarseView, crops: list[PlacedCrop], cache: DynamicCache
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
    features = encode_crops(vlm, [placed.crop for placed in crops], device)
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
