"""LLaVA-1.5: one fixed square grid, plain positions, no markers."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import CLIPImageProcessor, LlavaConfig, PreTrainedTokenizerFast

from modeling_qzoom import QZoomProcessor
from tests.families.family import TINY_TEXT, Family, Grid
from tests.families.tokenizers import byte_tokenizer, chat_template, random_source


PROCESSOR_ARGUMENTS = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": "<image>",
}


class LlavaFamily(Family):
    name = "llava"
    patch = 14
    fixed_grid = (4, 4)
    image_token = "<image>"
    vision_modules = ["model.vision_tower", "model.multi_modal_projector"]
    has_official_gate = False
    takes_videos = False

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"])
        tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token = "<pad>", "</s>", "<s>"
        tokenizer.chat_template = chat_template("<image>\n")
        return tokenizer

    def config(self, layers: int = 6) -> LlavaConfig:
        tokenizer = self.tokenizer()
        return LlavaConfig(
            text_config={
                "model_type": "llama",
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "num_hidden_layers": layers,
                **TINY_TEXT,
            },
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": self.patch,
                "projection_dim": 32,
            },
            image_token_id=tokenizer.convert_tokens_to_ids(self.image_token),
            image_seq_length=16,
        )

    def processor(self, image_processor: Any = None, **kwargs: Any) -> QZoomProcessor:
        """56 × 56 pixels, 4 × 4 tokens."""
        return QZoomProcessor(
            image_processor or CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
            self.tokenizer(),
            backbone_model_type=self.name,
            backbone_processor_kwargs=PROCESSOR_ARGUMENTS,
            **kwargs,
        )

    def draw_image(self, grids: Iterator[Grid], seed: int, generator: torch.Generator) -> dict[str, Any]:
        return {
            "text": self.image_token * 16,
            "pixel_values": torch.randn(1, 3, 56, 56, generator=generator),
            "source": random_source(150 + 10 * (seed // 7) % 70, 130, seed),
        }


LLAVA = LlavaFamily()
