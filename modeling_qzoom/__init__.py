"""Q-Zoom for Hugging Face transformers: vision-language models that zoom only when and where the question needs it."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_qzoom import QZoomConfig
from .cost_prediction_qzoom import ZoomCost, zoom_cost
from .errors_qzoom import CheckpointError, InputError, QZoomError, UnsupportedError
from .modeling_outputs_qzoom import QZoomOutput
from .modeling_qzoom import QZoomForConditionalGeneration
from .processing_qzoom import QZoomProcessor
from .report_drawing_qzoom import overlay
from .report_qzoom import ZoomReport
from .zoom_pages_qzoom import Page


__version__ = "0.1.0"

__all__ = [
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

AutoConfig.register("qzoom", QZoomConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(QZoomConfig, QZoomForConditionalGeneration, exist_ok=True)
AutoProcessor.register(QZoomConfig, QZoomProcessor, exist_ok=True)

# saved checkpoints carry the code and name it in auto_map
QZoomConfig.register_for_auto_class()
QZoomForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
QZoomProcessor.register_for_auto_class("AutoProcessor")
