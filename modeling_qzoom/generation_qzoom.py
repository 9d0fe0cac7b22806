"""The zooming prefill: coarse pass to layer K, decision per row, fused second pass, one cache for decoding.

`generate` of transformers calls `_prefill` once; everything before and after it (sampling, beams, streamers, stopping,
lengths) is untouched, because only mask, positions and cache grow by the crop.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import CACHE, POSITION_OFFSET, is_dynamic, layer_states, mark_zoomed, set_layer_states
from .backbone_layers_qzoom import causal_mask, rotary, run_layers
from .generation_refusals_qzoom import check_padding, refuse_batched_images
from .prompt_qzoom import POSITION_INPUTS, as_visual_features, embed_prompt, prompt_positions
from .rows_qzoom import pad_left, select_rows, stack_positions
from .zoom_coarse_qzoom import CoarseView
from .zoom_decisions_qzoom import decide
from .zoom_request_qzoom import ZoomRequest
from .zoom_second_pass_qzoom import fused_prefill


REQUEST = "zoom_request"


@dataclass
class PrefillPart:
    """Some rows after all decoder layers.

    Attributes:
        rows: their indices in the batch.
        last_hidden: (b, D) state of the last token, before the final norm.
        cache: keys and values of all layers.
        positions: (3, b, n) or (b, n) float32.
        mask: (b, n) long, 0 on padding and on tokens that a prompt's own mask hides.
    """

    rows: list[int]
    last_hidden: Tensor
    cache: DynamicCache
    positions: Tensor
    mask: Tensor


def _batch_dim(positions: Tensor) -> int:
    return 1 if positions.ndim == 3 else 0


class QZoomGenerationMixin(GenerationMixin):
    """`GenerationMixin` with a prefill that can zoom, for a model that holds `vlm`, `zoom` and a `QZoomConfig`."""

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        # the VLM's own method keeps rope_deltas on the module, where a second thread would read them; ours travel with
        # the cache that they belong to
        text = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        spec = self.config.backbone
        cache, types = model_kwargs.get(CACHE), model_kwargs.get("mm_token_type_ids")
        cached = 0 if cache is None else cache.get_seq_length()
        if cached > 0 and (types is None or not types[:, cached:].any()):
            offset = getattr(cache, POSITION_OFFSET, None)
            if not spec.mrope:
                return text
            return text[None] if offset is None else (text + offset.to(text.device))[None]
        given = model_kwargs.get("input_ids")
        input_ids = inputs_tensor if given is None or given.shape[1] == 0 else given
        if input_ids.ndim != 2 or input_ids.is_floating_point():  # embeddings, which hide where images are
            return text[None].expand(4, -1, -1) if spec.mrope else text
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        vision = {name: model_kwargs[name] for name in POSITION_INPUTS if model_kwargs.get(name) is not None}
        return prompt_positions(self.vlm, spec, input_ids, mask, **vision)

    def _forward_positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, vision: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positions of a plain forward pass where the VLM would read or leave an offset on itself, and that offset."""
        spec = self.config.backbone
        cached = 0 if cache is None else cache.get_seq_length()
        length = cached + input_ids.shape[1]
        if cached > 0:
            offset = getattr(cache, POSITION_OFFSET, None)
            if offset is None:
                return None, None
            mask = input_ids.new_ones(len(input_ids), length) if attention_mask is None else attention_mask
            text = (mask.long().cumsum(-1) - 1)[:, cached:]  # (B, n)
            return (text + offset.to(text.device))[None].expand(3, -1, -1), None
        if not spec.mrope or not {"image_grid_thw", "video_grid_thw"} & set(vision):
            return None, None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        grids = {name: vision[name] for name in POSITION_INPUTS if name in vision}
        positions = prompt_positions(self.vlm, spec, input_ids, mask, **grids)
        return positions, positions[1:].amax((0, 2))[:, None] + 1 - mask.sum(1, keepdim=True)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        request: ZoomRequest | None = model_kwargs.get(REQUEST)
        if request is not None:
            request.expand_size = expand_size
            # the zooming prefill runs distinct rows; expansion below repeats the encoder's lists in place
            encoded = model_kwargs.get("mm_encoder_outputs") or {}
            request.encoder_outputs = {
                kind: as_visual_features(output) for kind, output in encoded.items() if output is not None
            }
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.vlm._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key != REQUEST})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs.pop(REQUEST, None)
        return self.vlm.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Continuous batching of transformers, for text only.

        Raises:
            ValueError: a prompt holds image tokens.
        """
        refuse_batched_images(inputs, self.config.image_token_id)
        return super().generate_batch(inputs, *args, **kwargs)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        request: ZoomRequest | None = model_kwargs.get(REQUEST)
        cache = model_kwargs.get(CACHE)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if cache is not None and positions is not None and positions.ndim == 3 and len(positions) == 4:
            setattr(cache, POSITION_OFFSET, positions[1, :, -1:] - positions[0, :, -1:])
        if request is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        cache, positions = self._plain_cache(cache), model_kwargs["position_ids"]
        repeat = request.expand_size
        check_padding(mask)  # generate may have inferred it from pad tokens
        batch_dim = _batch_dim(positions)
        distinct = range(0, len(input_ids), repeat)
        with run_rows(request.adapters, range(len(distinct))):
            outputs, merged = self._zoom_prefill(
                request,
                select_rows(input_ids, distinct),
                None if mask is None else select_rows(mask, distinct),
                select_rows(positions, distinct, batch_dim),
                cache,
            )
        if repeat > 1:
            cache.batch_repeat_interleave(repeat)
            outputs.logits = outputs.logits.repeat_interleave(repeat, dim=0)
        if merged is not None:
            fused_mask, fused_positions = merged
            model_kwargs["attention_mask"] = fused_mask.repeat_interleave(repeat, dim=0)
            model_kwargs["position_ids"] = fused_positions.repeat_interleave(repeat, dim=batch_dim)
            model_kwargs.pop("mm_token_type_ids", None)
            mark_zoomed(cache)
        return outputs

    @staticmethod
    def _plain_cache(cache: Cache | None) -> DynamicCache:
        if cache is None or not is_dynamic(cache):
            kind = "no cache" if cache is None else type(cache).__name__
            kind = f"an offloaded {kind}" if getattr(cache, "offloading", False) else kind
            raise ValueError(
                f"zooming needs a plain DynamicCache, because the crop's length is known only after the coarse pass; "
                f"this call uses {kind}. Leave use_cache and cache_implementation at their defaults, or pass "
                "zoom='never'."
            )
        return cache

    def _zoom_prefill(
        self,
        request: ZoomRequest,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        cache: DynamicCache,
    ) -> tuple[CausalLMOutputWithPast, tuple[Tensor, Tensor] | None]:
        """Steps 1 to 7 on distinct rows.

        Args:
            input_ids, attention_mask: (B, N); no mask when nothing is padded.
            positions: (3 or 4, B, N) or (B, N).
            cache: empty; filled.

        Returns:
            The outputs, and mask (B, M) and positions (…, B, M) for decoding if any row zoomed.
        """
        vlm, decoder = self.vlm, self.vlm.get_decoder()
        encoded = request.encoder_outputs
        embeds, deepstack = embed_prompt(vlm, input_ids, encoded.get("image"), encoded.get("video"))
        positions = positions[-3:] if positions.ndim == 3 else positions
        position_embeddings = rotary(decoder, embeds, positions)
        mask = causal_mask(decoder, embeds, attention_mask, cache)
        layer_k, last_layer = self.config.branch_layer, len(decoder.layers)
        passing: dict[str, Any] = {"position_embeddings": position_embeddings, "cache": cache, "deepstack": deepstack}
        hidden = run_layers(decoder, embeds, 0, layer_k, mask=mask, **passing)
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        view = CoarseView(input_ids, valid, positions, position_embeddings, mask, embeds, deepstack, hidden)
        request.reports, crops = decide(self, request, view)
        if not crops:
            hidden = run_layers(decoder, hidden, layer_k, last_layer, mask=mask, **passing)
            return self._logits(hidden[:, -1], cache), None

        zoomed = [crop.row for crop in crops]
        skipped = [row for row in range(len(input_ids)) if row not in zoomed]
        parts = [PrefillPart(zoomed, *fused_prefill(self, request, view, crops, cache))]
        if skipped:
            with run_rows(request.adapters, skipped):
                parts.append(self._resume(view, skipped, cache))
        return self._merge(parts, cache)

    def _resume(self, view: CoarseView, rows: list[int], cache: DynamicCache) -> PrefillPart:
        """Layers [K, L) for the rows that keep the coarse view, without the padding that only longer rows needed."""
        decoder, layer_k = self.vlm.get_decoder(), self.config.branch_layer
        valid = select_rows(view.valid, rows)
        length = valid.shape[1] - int(valid.argmax(1).min())  # tokens hidden inside a prompt stay in place
        valid = valid[:, -length:]
        part_cache = DynamicCache(config=decoder.config)
        for layer in range(layer_k):
            keys, values = (select_rows(states, rows)[:, :, -length:] for states in layer_states(cache, layer))
            set_layer_states(part_cache, layer, keys, values)
        hidden = select_rows(view.hidden, rows)[:, -length:]
        positions = select_rows(view.positions, rows, _batch_dim(view.positions))[..., -length:]
        cos, sin = (select_rows(part, rows)[:, -length:] for part in view.position_embeddings)
        hidden = run_layers(
            decoder,
            hidden,
            layer_k,
            len(decoder.layers),
            mask=causal_mask(decoder, hidden, valid, None),
            position_embeddings=(cos, sin),
            cache=part_cache,
            deepstack=None if view.deepstack is None else view.deepstack.select(rows, length),
        )
        return PrefillPart(rows, hidden[:, -1], part_cache, positions.float(), valid)

    def _merge(
        self, parts: list[PrefillPart], cache: DynamicCache
    ) -> tuple[CausalLMOutputWithPast, tuple[Tensor, Tensor]]:
        """All rows in one left-padded batch, in their original order."""
        order = [(part, index) for part in parts for index in range(len(part.rows))]
        order.sort(key=lambda item: item[0].rows[item[1]])
        length = max(part.mask.shape[1] for part in parts)
        for layer in range(len(self.vlm.get_decoder().layers)):
            states = [layer_states(part.cache, layer) for part in parts]
            if len(parts) == 1:
                set_layer_states(cache, layer, *states[0])
                continue
            by_part = {id(part): pair for part, pair in zip(parts, states)}
            keys, values = (
                pad_left([by_part[id(part)][kind][index] for part, index in order], length, dim=1) for kind in (0, 1)
            )
            set_layer_states(cache, layer, keys, values)
        last_hidden = torch.stack([part.last_hidden[index] for part, index in order])
        mask = pad_left([part.mask[index].to(last_hidden.device) for part, index in order], length)
        positions = stack_positions([part.positions[..., index, :] for part, index in order], length)
        return self._logits(last_hidden, cache), (mask, positions.contiguous())

    def _logits(self, last_hidden: Tensor, cache: DynamicCache) -> CausalLMOutputWithPast:
        """(B, D) states of the last tokens → (B, 1, vocabulary) logits."""
        normed = self.vlm.get_decoder().norm(last_hidden[:, None])
        return CausalLMOutputWithPast(logits=self.get_output_embeddings()(normed), **{CACHE: cache})
