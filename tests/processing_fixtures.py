"""Tiny processors of every family for the processor's tests; nothing is downloaded."""

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor

from modeling_qzoom import QZoomProcessor
from tests.tiny import llava_tokenizer, qwen_tokenizer


LLAVA_ARGUMENTS = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": "<image>",
}


def qwen_processor(**kwargs) -> QZoomProcessor:
    """28 pixels a token."""
    return QZoomProcessor(Qwen2VLImageProcessor(patch_size=14, merge_size=2), qwen_tokenizer(), **kwargs)


def qwen3_processor(**kwargs) -> QZoomProcessor:
    """32 pixels a token."""
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2)
    return QZoomProcessor(images, qwen_tokenizer(), backbone_model_type="qwen3_vl", **kwargs)


def llava_processor(image_processor=None, **kwargs) -> QZoomProcessor:
    """56 × 56 pixels, 4 × 4 tokens."""
    return QZoomProcessor(
        image_processor or CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        llava_tokenizer(),
        backbone_model_type="llava",
        backbone_processor_kwargs=LLAVA_ARGUMENTS,
        **kwargs,
    )


PROCESSORS = {"qwen2_5_vl": qwen_processor, "qwen3_vl": qwen3_processor, "llava": llava_processor}


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
