"""Processors, pictures and chats for the processor's tests; nothing is downloaded."""

import numpy as np
from PIL import Image

from modeling_qzoom import QZoomProcessor
from tests.families import FAMILY
from tests.families.llava import LLAVA
from tests.families.llava import PROCESSOR_ARGUMENTS as LLAVA_ARGUMENTS
from tests.families.qwen2_5_vl import QWEN2_5_VL
from tests.families.qwen3_vl import QWEN3_VL


__all__ = [
    "LLAVA_ARGUMENTS",
    "PROCESSORS",
    "chat",
    "llava_processor",
    "noise",
    "process",
    "qwen3_processor",
    "qwen_processor",
]

PROCESSORS = {name: family.processor for name, family in FAMILY.items()}
qwen_processor, qwen3_processor, llava_processor = QWEN2_5_VL.processor, QWEN3_VL.processor, LLAVA.processor


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(*parts) -> list[dict]:
    """One user message; strings are text, everything else is an image."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def process(processor: QZoomProcessor, chats: list, **kwargs):
    """Chats in one go, as users do it."""
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True, **kwargs)
