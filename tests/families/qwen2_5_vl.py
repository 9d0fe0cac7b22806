"""Qwen2.5-VL: 28 pixels a token, a vision tower with windows."""

from transformers import Qwen2_5_VLConfig

from tests.families.qwen import QwenFamily


class Qwen2_5VLFamily(QwenFamily):
    name = "qwen2_5_vl"
    patch = 14

    def config(self, layers: int = 6) -> Qwen2_5_VLConfig:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        return Qwen2_5_VLConfig(
            text_config={"rope_parameters": rope, **self.text(layers)},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": self.patch,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            **self.token_ids(),
        )


QWEN2_5_VL = Qwen2_5VLFamily()
