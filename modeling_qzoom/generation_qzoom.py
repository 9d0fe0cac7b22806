"""Where the zooming prefill hooks into `generate` of transformers.

`generate` of transformers calls `_prefill` once; everything before and after it (sampling, beams, streamers, stopping,
lengths) is untouched, because only mask, positions and cache grow by the crop.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .backbone_adapters_qzoom import run_rows
from .backbone_cache_qzoom import CACHE, is_static, notes_of, static_copy, write_notes, zoomable_cache
from .configuration_qzoom import QZoomConfig
from .generation_refusals_qzoom import check_padding, refuse_batched_images
from .plain_prefill_qzoom import plain_prefill
from .prompt_qzoom import POSITION_INPUTS, as_visual_features, prompt_positions
from .rows_qzoom import Positions, pick
from .visor_router_qzoom import Visor
from .zoom_branches_qzoom import ZoomBranches
from .zoom_page_call_qzoom import QZoomPageMixin
from .zoom_prefill_qzoom import zoom_prefill
from .zoom_request_qzoom import ZoomRequest, unread_inputs


# the keyword under which a request travels through transformers' `generate`
REQUEST = "zoom_request"


class QZoomGenerationMixin(QZoomPageMixin, GenerationMixin):
    """`GenerationMixin` with a prefill that can zoom, for a model that holds `vlm`, `zoom` and a `QZoomConfig`."""

    config: QZoomConfig
    vlm: PreTrainedModel
    zoom: ZoomBranches
    visor: Visor | None

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        # the VLM's own method keeps rope_deltas on the module, where a second thread would read them; ours travel with
        # the cache that they belong to
        text = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        spec = self.config.backbone
        cache, types = model_kwargs.get(CACHE), model_kwargs.get("mm_token_type_ids")
        cached = 0 if cache is None else cache.get_seq_length()
        if cached > 0 and (types is None or not types[:, cached:].any()):
            offset = notes_of(cache).position_offset
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
            offset = notes_of(cache).position_offset
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

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        request: ZoomRequest | None = model_kwargs.get(REQUEST)
        if request is not None:
            model_kwargs = unread_inputs(self.config, request, model_kwargs)
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        request: ZoomRequest | None = model_kwargs.get(REQUEST)
        if request is not None:
            # the zooming prefill runs distinct rows; expansion below repeats the encoder's lists in place
            encoded = model_kwargs.get("mm_encoder_outputs") or {}
            features = {kind: as_visual_features(output) for kind, output in encoded.items() if output is not None}
            model_kwargs[REQUEST] = replace(request, expand_size=expand_size).with_features(features)
            if request.unread_images() is not None:
                model_kwargs.pop("mm_encoder_outputs", None)  # which would have to hold every image to be repeated
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.vlm._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key != REQUEST})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of one decoding step, as the VLM makes them."""
        kwargs.pop(REQUEST, None)
        return self.vlm.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Continuous batching of transformers, for text only.

        Raises:
            UnsupportedError: a prompt holds image tokens.
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
        cache, positions = model_kwargs.get(CACHE), model_kwargs.get("position_ids")
        if cache is not None and positions is not None and positions.ndim == 3 and len(positions) == 4:
            write_notes(cache, position_offset=positions[1, :, -1:] - positions[0, :, -1:])
        if request is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        is_compiled = is_static(cache) and request.makes_cache
        cache = DynamicCache(config=self.config.get_text_config()) if is_compiled else zoomable_cache(cache)
        mask, repeat = model_kwargs.get("attention_mask"), request.expand_size
        check_padding(mask)  # generate may have inferred it from pad tokens
        distinct = range(0, len(input_ids), repeat)
        with run_rows(request.adapters, range(len(distinct))):
            run_prefill = plain_prefill if request.is_plain else zoom_prefill
            prefill = run_prefill(
                self,
                request,
                pick(input_ids, distinct),
                None if mask is None else pick(mask, distinct),
                Positions.of(model_kwargs["position_ids"]).pick(distinct),
                cache,
            )
            normed = self.vlm.get_decoder().norm(prefill.last_hidden[:, None])  # (B, 1, D)
            logits = self.get_output_embeddings()(normed)
        if prefill.mask is not None and prefill.positions is not None:
            model_kwargs["attention_mask"] = prefill.mask.repeat_interleave(repeat, dim=0)
            model_kwargs["position_ids"] = prefill.positions.repeat(repeat).for_decoder()
            model_kwargs.pop("mm_token_type_ids", None)
            write_notes(cache, holds_crops=True)
            if prefill.layer_masks is not None:
                write_notes(cache, layer_masks=prefill.layer_masks.repeat(repeat))
        if repeat > 1:
            cache.batch_repeat_interleave(repeat)
            logits = logits.repeat_interleave(repeat, dim=0)
        if is_compiled:  # now the length is known
            new_tokens = generation_config.max_length - input_ids.shape[1]
            cache = static_copy(self.config.get_text_config(), cache, cache.get_seq_length() + new_tokens)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})
