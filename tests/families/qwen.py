"""What both Qwen families share."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor

from modeling_qzoom import QZoomProcessor
from tests.families.family import TINY_TEXT, Family, Grid
from tests.families.tokenizers import byte_tokenizer, chat_template, random_source


QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(QWEN_SPECIALS)
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer.chat_template = chat_template(image, image.replace("image", "video"))
    return tokenizer


class QwenFamily(Family):
    """Native grids, M-RoPE, markers around an image."""

    image_token = "<|image_pad|>"
    vision_modules = ["model.visual"]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return qwen_tokenizer()

    def text(self, layers: int) -> dict[str, Any]:
        """The text configuration."""
        tokenizer = self.tokenizer()
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        return {**TINY_TEXT, "num_hidden_layers": layers, **ids}

    def token_ids(self) -> dict[str, int]:
        """Ids of the special tokens by the configuration's names."""
        names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
        names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
        tokenizer = self.tokenizer()
        return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}

    def processor(self, **kwargs: Any) -> QZoomProcessor:
        images = Qwen2VLImageProcessor(patch_size=self.patch, merge_size=2)
        return QZoomProcessor(images, self.tokenizer(), backbone_model_type=self.name, **kwargs)

    def draw_image(self, grids: Iterator[Grid], seed: int, generator: torch.Generator) -> dict[str, Any]:
        height, width = next(grids)
        return {
            "text": "<|vision_start|>" + self.image_token * (height * width) + "<|vision_end|>",
            "pixel_values": torch.randn(4 * height * width, 6 * self.patch**2, generator=generator),
            "image_grid_thw": [1, 2 * height, 2 * width],
            "source": random_source(height * 60 + seed // 7 % 7, width * 55, seed),
        }

    def finish_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        image = self.tokenizer().convert_tokens_to_ids(self.image_token)
        return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == image).int()}

    def video_text(self, frames: int, tokens: int) -> str:
        """One pair of markers around all frames."""
        return f"<|vision_start|>{'<|video_pad|>' * tokens * frames}<|vision_end|>"
