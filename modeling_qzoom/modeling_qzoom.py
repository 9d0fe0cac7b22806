"""Q-Zoom around any supported vision-language model: wiring, `forward` and `generate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .backbone_adapters_qzoom import no_adapters_left
from .backbone_cache_qzoom import CACHE, LayerMasks, given_cache, name_cache, notes_of, write_notes
from .backbone_decoding_qzoom import decode
from .backbone_layers_qzoom import check_decoder
from .configuration_qzoom import QZoomConfig
from .cost_prediction_qzoom import QZoomCostMixin
from .errors_qzoom import InputError, UnsupportedError
from .generation_qzoom import REQUEST, QZoomGenerationMixin
from .generation_refusals_qzoom import require_dict_output
from .loading_names_qzoom import with_own_names
from .loading_qzoom import QZoomLoadingMixin
from .modeling_outputs_qzoom import QZoomOutput
from .report_qzoom import ZoomReport
from .source_images_qzoom import SourceInput
from .training_checks_qzoom import check_combination, check_names, check_training_call
from .training_losses_qzoom import branch_pass, fused_language_pass, with_unused
from .visor_router_qzoom import visor_of
from .visor_routing_qzoom import check_routing_call, routing_pass
from .visor_training_qzoom import check_sparse_call, sparse_language_pass
from .zoom_branches_qzoom import ZoomBranches
from .zoom_decisions_qzoom import plain_reports
from .zoom_options_qzoom import OPTION_NAMES, resolve_options, resolve_reports
from .zoom_pages_qzoom import Page
from .zoom_plan_qzoom import plan_zoom
from .zoom_request_qzoom import ZoomRequest


class QZoomPreTrainedModel(PreTrainedModel):
    """Class-wide declarations; everything about layers comes from the wrapped VLM."""

    config_class = QZoomConfig
    base_model_prefix = "vlm"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    # fp16 keeps these in float32; every 4- and 8-bit recipe leaves them out
    _keep_in_fp32_modules = ["zoom.gate.head", "zoom.region.scorer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False


class QZoomForConditionalGeneration(QZoomLoadingMixin, QZoomCostMixin, QZoomPreTrainedModel, QZoomGenerationMixin):
    """A VLM (`vlm`, an unchanged class of transformers) and its two zoom branches (`zoom`)."""

    def __init__(self, config: QZoomConfig) -> None:
        config.check_fields()  # of what was assigned since it was made
        super().__init__(config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        decoder = self.vlm.get_decoder()
        check_decoder(decoder)
        self.zoom = ZoomBranches(config, decoder, config.backbone)
        self.visor = visor_of(config, decoder)
        self.post_init()

    # `base_model_prefix` drives loading; generate and trainers want the headless model
    @property
    def base_model(self) -> nn.Module:
        """The VLM without its output layer."""
        return self.vlm.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The VLM's embedding of the vocabulary."""
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the VLM's embedding of the vocabulary."""
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The VLM's output layer."""
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the VLM's output layer."""
        self.vlm.set_output_embeddings(value)

    def get_decoder(self) -> PreTrainedModel:
        """The VLM's decoder: layers, final norm and rotary embedding."""
        return self.vlm.get_decoder()

    @can_return_tuple
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """Encoded images, as the VLM returns them."""
        return self.vlm.get_image_features(*args, return_dict=True, **kwargs)

    # a property, so that a model whose VLM knows no videos does not have it either
    @property
    def get_video_features(self) -> Callable[..., Any]:
        """Encodes videos as the VLM does."""
        encode = self.vlm.get_video_features

        @can_return_tuple
        def get_video_features(self: Any, *args: Any, **kwargs: Any) -> Any:
            return encode(*args, return_dict=True, **kwargs)

        return MethodType(get_video_features, self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module; names as `save_pretrained` writes them are understood too, which Trainer relies on."""
        return super().load_state_dict(with_own_names(self, state_dict), strict=strict, assign=assign)

    def _supports_logits_to_keep(self) -> bool:
        return self.vlm._supports_logits_to_keep()

    def _supports_mm_encoder_outputs(self) -> bool:
        return self.vlm._supports_mm_encoder_outputs()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        region_targets: Any = None,
        gate_targets: torch.Tensor | None = None,
        query_positions: torch.LongTensor | None = None,
        source_images: SourceInput | None = None,
        source_boxes: Any = None,
        zoom_boxes: Sequence[Any] | None = None,
        cache: Cache | None = None,
        vision: str | None = None,
        route_targets: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QZoomOutput:
        """One pass: plain, over a branch, over the fused sequence, under a configuration of VISOR, or over its router.

        - Without targets or labels it is the VLM's own forward, bit for bit. Sources are ignored, so that whatever a
          processor returned can be passed; a loss that is computed outside, from logits alone, is one of the coarse
          view.
        - With `region_targets` or `gate_targets` the branches run on the coarse view and the layers above K do not.
          Sources are ignored here too.
        - With `labels` and `source_images`, rows are trained on the fused sequence of coarse view and crop. Labels of
          inserted positions are -100; the box carries no gradient.
        - With `vision`, rows run as `generate` runs them under that configuration, on the coarse view.
        - With `route_targets` the router runs on the coarse view and the layers above its own do not.

        Weights that a pass leaves out (branches with labels, layers above K with targets) get no gradient from it.
        Under DistributedDataParallel it is zero, so a weight decay shrinks them there: freeze what is not trained.

        Args:
            input_ids, attention_mask: (B, N); padded on either side in training passes.
            past_key_values, cache: two names of one argument, whichever the installed transformers uses.
            labels: (B, N) next-token targets, -100 ignored.
            region_targets: per row None or (Q, h, w) in {1, 0, -100} for its only image, or a list with one such
                tensor per image; a stacked (B, Q, h, w) tensor will do.
                A map of another size than the image's token grid is compared with the resized logits. (h, w) stands
                for (1, h, w).
            gate_targets: (B,) in {1, 0, -100}; 1: the coarse view is not enough.
            query_positions: (B, Q) columns of the asking tokens; by default each row's last token, which is the last
                prompt token where the row holds no answer. -1 leaves a
                query of a shorter row out. The gate reads the first of them.
            source_images: the images in their own resolution, as `QZoomProcessor` returns them.
            source_boxes: (images, 4) rectangles of source pixels under the token grids, where the processor returns
                them.
            zoom_boxes: per row a box (x0, y0, x1, y1) in source pixels, a pair (image in the row, box), or None for a
                plain row. Left out, the region branch proposes the boxes.
            vision: `"dense"` or a configuration of the checkpoint, for the whole batch.
            route_targets: (B,) place of the right configuration among the router's choices, -100 ignored.

        Raises:
            InputError: targets together with labels, an argument that this pass would not obey, a misspelt name of
                ours, or inputs that do not fit each other.
        """
        check_names(kwargs)
        check_combination(labels, region_targets, gate_targets, query_positions, zoom_boxes)
        cache = given_cache(past_key_values, cache)
        visual = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "mm_token_type_ids": mm_token_type_ids,
            "mm_encoder_outputs": mm_encoder_outputs,
            "second_per_grid_ts": second_per_grid_ts,
        }
        visual = {name: value for name, value in visual.items() if value is not None}
        has_targets = region_targets is not None or gate_targets is not None
        has_sources = source_images is not None or zoom_boxes is not None
        if route_targets is not None:
            others = {"labels": labels, "region_targets": region_targets, "gate_targets": gate_targets}
            check_routing_call({**others, "vision": vision})
            ids = check_training_call(input_ids, position_ids, cache, inputs_embeds, use_cache, logits_to_keep, kwargs)
            return QZoomOutput(**routing_pass(self, ids, attention_mask, visual, route_targets))
        if vision is not None:
            check_sparse_call(vision, has_targets, has_sources)
            ids = check_training_call(input_ids, position_ids, cache, inputs_embeds, use_cache, logits_to_keep, kwargs)
            items = kwargs.get("num_items_in_batch")
            loss, logits = sparse_language_pass(self, ids, attention_mask, visual, labels, vision, items)
            return self._with_branches(QZoomOutput(loss=loss, logits=logits))
        if has_targets or (labels is not None and has_sources):
            ids = check_training_call(input_ids, position_ids, cache, inputs_embeds, use_cache, logits_to_keep, kwargs)
            if labels is None:
                targets = region_targets, gate_targets, query_positions
                return QZoomOutput(**branch_pass(self, ids, attention_mask, visual, *targets))
            sources = source_images, source_boxes, zoom_boxes
            items = kwargs.get("num_items_in_batch")
            loss, logits = fused_language_pass(self, ids, attention_mask, visual, labels, *sources, items)
            return self._with_branches(QZoomOutput(loss=loss, logits=logits))
        layer_masks = notes_of(cache).layer_masks
        if layer_masks is not None and cache is not None:
            return self._planned_step(input_ids, position_ids, cache, layer_masks, logits_to_keep)
        offset = None
        if position_ids is None and input_ids is not None:
            position_ids, offset = self._forward_positions(input_ids, attention_mask, cache, visual)
        outputs = self.vlm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{CACHE: cache},
            **visual,
            **kwargs,
        )
        if offset is not None and outputs.get(CACHE) is not None:
            write_notes(outputs[CACHE], position_offset=offset)
        values = dict(outputs)
        if "rope_deltas" in {field.name for field in fields(outputs)}:
            # before 5.24 an output of the VLM, which reads it from itself, where another call may have left it
            noted = notes_of(outputs.get(CACHE)).position_offset
            values["rope_deltas"] = offset if noted is None else noted
        return self._with_branches(QZoomOutput(**values))

    def _planned_step(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
        layer_masks: LayerMasks,
        logits_to_keep: int | Tensor,
    ) -> QZoomOutput:
        """A step of `generate` behind a prefill whose layers hold different tokens."""
        if input_ids is None or position_ids is None:
            raise UnsupportedError(
                "this cache comes from a turn that zoomed with keep_share below 1, and only `generate` can go on from "
                "it. Pass the whole conversation without a cache."
            )
        hidden = decode(self.vlm, input_ids, position_ids, cache, layer_masks)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.vlm.get_output_embeddings()(hidden[:, kept])
        return QZoomOutput(logits=logits, **{CACHE: cache})

    def _with_branches(self, output: QZoomOutput) -> QZoomOutput:
        """The result of a pass that runs no branch, for wrappers that wait for every trainable weight."""
        if not torch.is_grad_enabled():
            return output
        unused = [*self.zoom.parameters(), *([] if self.visor is None else self.visor.parameters())]
        for name in ("loss", "logits"):
            if output.get(name) is not None:
                output[name] = with_unused(output[name], unused)
        return output

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        source_images: SourceInput | None = None,
        source_boxes: Any = None,
        zoom: str | None = None,
        effort: str | None = None,
        gate_threshold: float | None = None,
        region_threshold: float | None = None,
        region_threshold_mode: str | None = None,
        crop_min_tokens: int | None = None,
        crop_max_tokens: int | None = None,
        position_alignment: str | None = None,
        crop_budget: str | None = None,
        crop_target_tokens: int | None = None,
        region_blur: str | None = None,
        region_min_peak: float | None = None,
        region_min_contrast: float | None = None,
        gate_branch: str | None = None,
        region_branch: str | None = None,
        keep_share: float | None = None,
        keep_margin: int | None = None,
        skip_unread: bool | None = None,
        vision: str | Sequence[str] | None = None,
        return_zoom_reports: bool | None = None,
        zoom_reports: list[ZoomReport] | None = None,
        page: Page | Sequence[Page | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` of transformers, with a prefill that zooms where the question needs it.

        Every option left out is taken from `generation_config`, then from the model's config.

        Args:
            inputs, generation_config, *args, **kwargs: as for any model of transformers.
            source_images: the images in their own resolution, one per image of the prompts in order of appearance
                (flat, or one list per row): PIL images or uint8 tensors (3, H, W). `QZoomProcessor` returns them.
            source_boxes: (images, 4) rectangles (x0, y0, x1, y1) of source pixels under the token grids, for backbones
                whose processor pads or crops. `QZoomProcessor` returns them.
            zoom: `"auto"` (rows whose gate opens), `"always"` or `"never"` (the plain VLM, bit for bit).
            effort: name of one of the checkpoint's presets; explicit options win over it.
            gate_threshold: gate probability from which on a row zooms; 0 always, above 1 never.
            region_threshold: heat-map value above which a cell belongs to the region.
            region_threshold_mode: `"absolute"`, or `"peak"`: relative to the map's largest value.
            crop_min_tokens, crop_max_tokens: budget of the crop in merged visual tokens.
            position_alignment: `"continuous"` or `"sequential"` positions of the crop's tokens.
            gate_branch, region_branch: `"full"`, or `"light"`: visual tokens stay as they are in the branch's layers.
            keep_share: share of the zoomed image's coarse tokens that stay above layer K, the hottest first.
            keep_margin: cells around the region that are kept before others.
            skip_unread: runs no layer for tokens that nobody reads, and what rows share once; changes only rounding.
            vision: `"dense"`, or a configuration of the checkpoint: which layers visual tokens take part in (VISOR).
                A list names one for every row.
            crop_budget: `"fixed"`, `"need"` or `"visionrl2"`: how many tokens a crop gets between its bounds.
            crop_target_tokens: up to how many tokens the last two enlarge a region.
            region_blur: `"fixed"`, or `"grid"`: wider on larger grids.
            region_min_peak, region_min_contrast: smallest peak, and peak over mean, of a map that is zoomed into.
            return_zoom_reports: adds `zoom_reports`, one `ZoomReport` per prompt row, to a dict output.
            zoom_reports: an empty list, which gets the same reports as soon as they are known: before the first word,
                for streamers and stopping criteria.
            page: what `read_page` returned for the beginning of the prompts, or a list with one (or None) per row;
                other inputs stay as they are. Results change by rounding, also those of `zoom="never"`.

        Returns:
            (B, n) ids `[prompt | new tokens]`, or the dict output of transformers.

        Raises:
            InputError: options out of range, image tokens without `source_images`, right-padded rows, a list of
                reports that is not empty, or a prompt that does not begin with its page.
            UnsupportedError: a decoding feature that cannot go with zooming (`zoom="never"` always can).
        """
        arguments = locals()  # every option is an argument of its name
        call_options = {name: arguments[name] for name in (*OPTION_NAMES, "effort")}
        # transformers fills what the call's generation config leaves open from the model's
        configs = [entry for entry in (generation_config, self.generation_config) if entry is not None]
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if zoom_reports:
            raise InputError("zoom_reports must be an empty list, which the call fills; pass a new one to each call.")
        with no_adapters_left(self):
            options = resolve_options(call_options, configs, self.config, mrope=self.config.backbone.mrope)
            has_reports = resolve_reports(return_zoom_reports, configs)
            if has_reports:
                require_dict_output(kwargs)
            name_cache(kwargs)
            request = plan_zoom(self, options, input_ids, source_images, source_boxes, args, configs, kwargs, page)
            if request is not None:
                request = request if zoom_reports is None else replace(request, reports=zoom_reports)
                kwargs[REQUEST] = request
            elif zoom_reports is not None and input_ids is not None:
                zoom_reports += plain_reports(self.config, input_ids, "off")
            outputs = super().generate(inputs, generation_config, *args, **kwargs)
        if has_reports:
            outputs["zoom_reports"] = self._reports(request, input_ids, kwargs.get("inputs_embeds"), outputs)
        return outputs

    def _reports(
        self, request: ZoomRequest | None, input_ids: Tensor | None, embeds: Tensor | None, outputs: ModelOutput
    ) -> list[ZoomReport]:
        """One report per prompt row of a call that has ended."""
        if request is not None:
            return request.reports
        if input_ids is None:  # embeddings hide what the prompt holds; without any, generate made the prompt itself
            input_ids = outputs.sequences if embeds is None else embeds[:, :0, 0]
        return plain_reports(self.config, input_ids, "off")
