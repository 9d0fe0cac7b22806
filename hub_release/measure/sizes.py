"""The models of the tables: published sizes, written down so that nothing has to be downloaded."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from hub_release.official.format import LLAVA_VISION
from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from modeling_qzoom.zoom_options_qzoom import NEW_CHECKPOINT


ModelClass = type[PreTrainedModel] | type[AutoModelForImageTextToText]

_QWEN_TOKENS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


@dataclass(frozen=True)
class ModelRow:
    """A published VLM.

    Attributes:
        name: name in the table.
        vlm: its configuration, as far as it decides over shapes.
        branch_layer, branch_depth: K and T of the published branches.
    """

    name: str
    vlm: dict[str, Any]
    branch_layer: int
    branch_depth: int = 3

    def config(self, zooms: bool) -> tuple[PreTrainedConfig, ModelClass]:
        """Configuration and class of the model, with Q-Zoom as a new checkpoint has it, or plain."""
        fields = dict(self.vlm)
        if not zooms:
            return AutoConfig.for_model(fields.pop("model_type"), **fields), AutoModelForImageTextToText
        options: dict[str, Any] = {
            "branch_layer": self.branch_layer,
            "branch_depth": self.branch_depth,
            **NEW_CHECKPOINT,
        }
        config = QZoomConfig(vlm_config=fields, **options)
        return config, QZoomForConditionalGeneration


def _qwen2_5(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tied,
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": width,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        **_QWEN_TOKENS,
    }


_QWEN3_4B = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "deepstack_visual_indexes": [5, 11, 17],
        "num_position_embeddings": 2304,
    },
    **_QWEN_TOKENS,
}

_LLAVA_7B = {
    "model_type": "llava",
    "tie_word_embeddings": False,
    "image_token_id": 32000,
    "image_seq_length": 576,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": LLAVA_VISION,
}

# of the memory table
MODELS = {
    "3B": ModelRow("Qwen2.5-VL-3B", _qwen2_5(2048, 11008, 36, 16, 2, 151936, tied=True), branch_layer=24),
    "4B": ModelRow("Qwen3-VL-4B", _QWEN3_4B, branch_layer=24),
    "7B": ModelRow("Qwen2.5-VL-7B", _qwen2_5(3584, 18944, 28, 28, 4, 152064, tied=False), branch_layer=18),
}
# no published model: what a CPU can time many calls of, in Qwen2.5-VL-7B's proportions
_MID = _qwen2_5(768, 4096, 14, 12, 2, 8192, tied=True)
_MID |= {"vision_config": _MID["vision_config"] | {"depth": 8, "hidden_size": 320, "intermediate_size": 856}}
_MID["vision_config"] |= {"num_heads": 4, "fullatt_block_indexes": [3, 7]}
_MID |= {"image_token_id": 8001, "video_token_id": 8002, "vision_start_token_id": 8003, "vision_end_token_id": 8004}
_MID["text_config"] |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}

# of the benchmark, by the names that its command line takes
BACKBONES = {
    "qwen2.5-vl-3b": MODELS["3B"],
    "qwen2.5-vl-7b": MODELS["7B"],
    "qwen3-vl-4b": MODELS["4B"],
    "llava-1.5-7b": ModelRow("LLaVA-1.5-7B", _LLAVA_7B, branch_layer=15),
    "mid-size": ModelRow("Mid-size", _MID, branch_layer=9),
}
