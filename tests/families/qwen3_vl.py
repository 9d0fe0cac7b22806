"""Qwen3-VL: 32 pixels a token, DeepStack features at the first three decoder layers, head norms."""

from transformers import Qwen3VLConfig

from tests.families.qwen import QwenFamily


class Qwen3VLFamily(QwenFamily):
    name = "qwen3_vl"
    patch = 16
    two_layouts = False

    def config(self, layers: int = 6) -> Qwen3VLConfig:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        return Qwen3VLConfig(
            text_config={"head_dim": 16, "rope_parameters": rope, **self.text(layers)},
            vision_config={
                "depth": 4,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": self.patch,
                "deepstack_visual_indexes": [0, 1, 2],
                "num_position_embeddings": 64,
            },
            **self.token_ids(),
        )

    def video_text(self, frames: int, tokens: int) -> str:
        """A pair of markers around every frame, behind its time stamp."""
        frame = f"<|vision_start|>{'<|video_pad|>' * tokens}<|vision_end|>"
        return "".join(f"<{second}.0 s>{frame}" for second in range(frames))


QWEN3_VL = Qwen3VLFamily()
