"""The public names keep their parameters, defaults and fields: what people wrote against them goes on working."""

import inspect
from collections.abc import Callable
from dataclasses import fields

import pytest

import modeling_qzoom
from modeling_qzoom import (
    Page,
    QZoomConfig,
    QZoomForConditionalGeneration,
    QZoomOutput,
    QZoomProcessor,
    ZoomReport,
    overlay,
    zoom_cost,
)
from modeling_qzoom.zoom_options_qzoom import ZoomOptions


CALLABLES: dict[str, Callable] = {
    "generate": QZoomForConditionalGeneration.generate,
    "read_page": QZoomForConditionalGeneration.read_page,
    "Page.to": Page.to,
    "forward": inspect.unwrap(QZoomForConditionalGeneration.forward),
    "from_backbone": QZoomForConditionalGeneration.from_backbone,
    "from_pretrained": QZoomForConditionalGeneration.from_pretrained,
    "save_pretrained": QZoomForConditionalGeneration.save_pretrained,
    "save_addon": QZoomForConditionalGeneration.save_addon,
    "merge_lora": QZoomForConditionalGeneration.merge_lora,
    "QZoomConfig": QZoomConfig.__init__,
    "QZoomProcessor": QZoomProcessor.__init__,
    "QZoomProcessor.__call__": QZoomProcessor.__call__,
    "QZoomProcessor.from_backbone": QZoomProcessor.from_backbone,
    "ZoomReport.overlay": ZoomReport.overlay,
    "overlay": overlay,
    "zoom_cost": zoom_cost,
    "QZoomForConditionalGeneration.zoom_cost": QZoomForConditionalGeneration.zoom_cost,
}
PUBLIC = [
    "CheckpointError",
    "InputError",
    "Page",
    "QZoomConfig",
    "QZoomError",
    "QZoomForConditionalGeneration",
    "QZoomOutput",
    "QZoomProcessor",
    "UnsupportedError",
    "ZoomCost",
    "ZoomReport",
    "overlay",
    "zoom_cost",
]
# parameters in order; those after "*" are keywords
SIGNATURES = {
    "zoom_cost": (
        "(config, image_size, *, text_tokens=64, prefix_tokens=15, min_tokens=None, max_tokens=None, "
        "crop_tokens=None, box=None, generation_configs=(), **options)"
    ),
    "QZoomForConditionalGeneration.zoom_cost": (
        "(image_size, *, text_tokens=64, prefix_tokens=15, min_tokens=None, max_tokens=None, crop_tokens=None, "
        "box=None, **options)"
    ),
    "generate": (
        "(inputs=None, generation_config=None, *args, source_images=None, source_boxes=None, zoom=None, "
        "effort=None, gate_threshold=None, region_threshold=None, region_threshold_mode=None, "
        "crop_min_tokens=None, crop_max_tokens=None, position_alignment=None, crop_budget=None, "
        "crop_target_tokens=None, region_blur=None, region_min_peak=None, region_min_contrast=None, "
        "gate_branch=None, region_branch=None, keep_share=None, keep_margin=None, skip_unread=None, vision=None, "
        "return_zoom_reports=None, zoom_reports=None, page=None, **kwargs)"
    ),
    "read_page": (
        "(input_ids, attention_mask=None, *, pixel_values=None, image_grid_thw=None, mm_token_type_ids=None, "
        "source_images=None, source_boxes=None, gate_branch=None, region_branch=None, **others)"
    ),
    "Page.to": "(device)",
    "forward": (
        "(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, "
        "inputs_embeds=None, labels=None, use_cache=None, pixel_values=None, image_grid_thw=None, "
        "pixel_values_videos=None, video_grid_thw=None, mm_token_type_ids=None, logits_to_keep=0, "
        "mm_encoder_outputs=None, second_per_grid_ts=None, region_targets=None, gate_targets=None, "
        "query_positions=None, source_images=None, source_boxes=None, zoom_boxes=None, cache=None, vision=None, "
        "route_targets=None, **kwargs)"
    ),
    "from_backbone": "(vlm, *, branch_layer, branch_depth=3, has_gate=True, zoom_config=None, **kwargs)",
    "from_pretrained": (
        "(pretrained_model_name_or_path, *args, output_loading_info=False, "
        "base_model_name_or_path=None, check_base=True, **kwargs)"
    ),
    "save_pretrained": "(save_directory, *args, **kwargs)",
    "save_addon": "(save_directory, *, base_model_name_or_path=None, base_model_revision=None)",
    "merge_lora": "()",
    "QZoomConfig": (
        "(vlm_config=None, branch_layer=18, branch_depth=3, has_gate=True, zoom='auto', "
        "gate_threshold=0.1, region_threshold=0.1, region_threshold_mode='absolute', "
        "crop_min_tokens=None, crop_max_tokens=None, position_alignment=None, effort=None, "
        "presets=None, min_tokens=None, max_tokens=None, image_mean=None, image_std=None, "
        "base_model_name_or_path=None, base_model_revision=None, lora_subfolder=None, crop_budget='fixed', "
        "crop_target_tokens=None, region_blur='fixed', region_min_peak=0.0, region_min_contrast=0.0, "
        "gate_branch='full', region_branch='full', keep_share=1.0, keep_margin=1, skip_unread=None, "
        "vision='dense', visor=None, **kwargs)"
    ),
    "QZoomProcessor": (
        "(image_processor=None, tokenizer=None, chat_template=None, backbone_model_type='qwen2_5_vl', "
        "backbone_processor_kwargs=None, min_tokens=None, max_tokens=None, max_source_pixels=178956970, "
        "video_config=None)"
    ),
    "QZoomProcessor.__call__": (
        "(images=None, text=None, videos=None, audio=None, *, min_tokens=None, max_tokens=None, **kwargs)"
    ),
    "QZoomProcessor.from_backbone": (
        "(processor_or_name, min_tokens=None, max_tokens=None, *, max_source_pixels=178956970, **kwargs)"
    ),
    "ZoomReport.overlay": "(image, **kwargs)",
    "overlay": "(image, report, *, alpha=0.6, max_side=1024, show_crop=True, show_caption=True)",
}
FIELDS = {
    "ZoomReport": [
        "gate_probability",
        "zoomed",
        "reason",
        "image_index",
        "box",
        "region_logits",
        "heatmap",
        "coarse_tokens",
        "crop_tokens",
        "grid_box",
        "has_gate",
        "empty_rule",
        "vision",
    ],
    "QZoomOutput": [
        "loss",
        "logits",
        "hidden_states",
        "attentions",
        "region_loss",
        "gate_loss",
        "region_logits",
        "gate_logits",
        "route_loss",
        "route_logits",
    ],
    "ZoomOptions": [
        "zoom",
        "gate_threshold",
        "region_threshold",
        "region_threshold_mode",
        "crop_min_tokens",
        "crop_max_tokens",
        "position_alignment",
        "crop_budget",
        "crop_target_tokens",
        "region_blur",
        "region_min_peak",
        "region_min_contrast",
        "gate_branch",
        "region_branch",
        "keep_share",
        "keep_margin",
        "skip_unread",
        "vision",
    ],
}
# what transformers names in its own way from version to version
RENAMED = {"past_key_values", "cache"}


def written(function: Callable) -> str:
    """A signature without annotations."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_the_public_names() -> None:
    assert sorted(modeling_qzoom.__all__) == PUBLIC


@pytest.mark.parametrize("name", CALLABLES)
def test_signatures(name: str) -> None:
    assert written(CALLABLES[name]) == SIGNATURES[name]


@pytest.mark.parametrize("kind", [ZoomReport, QZoomOutput, ZoomOptions], ids=lambda kind: kind.__name__)
def test_fields(kind: type) -> None:
    assert [field.name for field in fields(kind) if field.name not in RENAMED] == FIELDS[kind.__name__]
