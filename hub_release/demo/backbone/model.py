"""The demo's backbone: stock Qwen2.5-VL classes at a few million weights, and its optimiser."""

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


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


def build_optimizers(module: nn.Module, lr: float, tower_share: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, probes, norms and biases.

    Args:
        lr: Peak rate.
        tower_share: Share of the rate that the vision tower gets.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            hidden = weight.ndim == 2 and "embed" not in name and "heads." not in name
            kind = "matrices" if hidden else "pixels" if weight.ndim > 2 else "others"
            groups.setdefault((kind, "visual." in name), []).append(weight)

    def entries(kinds: tuple[str, ...]) -> list[dict]:
        found = []
        for (kind, in_tower), weights in groups.items():
            if kind in kinds:
                # 1176 correlated pixels enter each patch feature: at the others' rate its mean jumps at every step
                share = (tower_share if in_tower else 1.0) * (0.125 if kind == "pixels" else 1.0)
                found.append({"params": weights, "lr": lr * share})
        return found

    return [
        torch.optim.Muon(entries(("matrices",)), momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(entries(("others", "pixels")), betas=(0.9, 0.98), weight_decay=0.0),
    ]
