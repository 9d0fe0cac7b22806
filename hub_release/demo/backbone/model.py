"""The demo's backbone: stock Qwen2.5-VL classes at a few million weights, and how it takes its images."""

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


# a merged token is TOKEN pixels a side and consists of MERGE x MERGE patches; an image counts as TEMPORAL_PATCH frames
PATCH, MERGE, TEMPORAL_PATCH = 14, 2, 2
TOKEN = PATCH * MERGE
# pages are mostly pale paper; centring on it keeps the first layer well conditioned
IMAGE_MEAN, IMAGE_STD = 0.85, 0.3


def demo_config(vocab_size: int, token_ids: dict[str, int]) -> Qwen2_5_VLConfig:
    """Configuration of the demo backbone; every width is a multiple of 64, as 4-bit kernels on the CPU need it."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": token_ids["<|im_end|>"],
            "pad_token_id": token_ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 2,
            "out_hidden_size": 192,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "fullatt_block_indexes": [0, 1, 2, 3],
            # one window over any image: patches stay in reading order, which the dense labels rely on
            "window_size": 1792,
        },
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_backbone(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised backbone in float32."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # the default deviation of 0.02 is far too small for widths this small: embeddings and residuals start too faint
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed_tokens" not in name:
            nn.init.normal_(weight, std=(1.0 / weight.shape[1]) ** 0.5 * 0.8)
    return model
