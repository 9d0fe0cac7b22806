"""Tiny random models of every family, tokenizers and requests that need neither network nor processor."""

from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from modeling_qzoom import QZoomForConditionalGeneration


FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava")
QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(specials: list[str], **kwargs) -> PreTrainedTokenizerFast:
    """One token per byte, plus special tokens."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **kwargs)
    fast.add_special_tokens({"additional_special_tokens": specials})
    return fast


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(QWEN_SPECIALS)
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", image).replace("VIDEO", image.replace("image", "video"))
    return tokenizer


def llava_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"])
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token = "<pad>", "</s>", "<s>"
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", "<image>\n").replace("VIDEO", "")
    return tokenizer


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def vlm_config(family: str, layers: int = 6):
    """A configuration with real structure and small sizes."""
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    if family == "llava":
        tokenizer = llava_tokenizer()
        return LlavaConfig(
            text_config={
                "model_type": "llama",
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                **text,
            },
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
                "projection_dim": 32,
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
        )
    tokenizer = qwen_tokenizer()
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    if family == "qwen2_5_vl":
        return Qwen2_5_VLConfig(
            text_config={
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                **text,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
            **{key: value for key, value in _qwen_ids(tokenizer).items() if key != "vision_end_token_id"},
        )
    return Qwen3VLConfig(
        text_config={
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
            **text,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 64,
        },
        **_qwen_ids(tokenizer),
    )


def tiny_vlm(family: str, seed: int = 0, layers: int = 6):
    """The plain backbone, with weights large enough that no two tokens tie."""
    torch.manual_seed(seed)
    vlm = AutoModelForImageTextToText.from_config(vlm_config(family, layers)).eval()
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    vlm.generation_config.eos_token_id = None
    vlm.generation_config.pad_token_id = vlm.config.get_text_config().pad_token_id
    return vlm


def tiny_model(
    family: str, seed: int = 0, *, branch_layer: int = 3, branch_depth: int = 2, layers: int = 6, **zoom_config
) -> QZoomForConditionalGeneration:
    """A Q-Zoom model whose gate is undecided and whose region maps have contrast."""
    fields = {"min_tokens": 4, "max_tokens": 24} if family != "llava" else {}
    model = QZoomForConditionalGeneration.from_backbone(
        tiny_vlm(family, seed, layers),
        branch_layer=branch_layer,
        branch_depth=branch_depth,
        zoom_config={**fields, **zoom_config},
    )
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.zoom.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    _calibrate(model, family)
    return model


@torch.no_grad()
def _calibrate(model: QZoomForConditionalGeneration, family: str) -> None:
    """Rescales the random branches: gate logits of typical rows spread around 0, maps from nearly 0 to nearly 1."""
    grids = [(2, 3), (4, 4), (3, 5), (5, 2)]
    rows = [Row([f"row {seed}", None, f"? {7 * seed}"], [grids[seed % 4]], seed) for seed in range(8)]
    inputs = plain_inputs(make_inputs(family, rows))
    has_gate = model.zoom.gate is not None
    targets = {"gate_targets": torch.zeros(len(rows))} if has_gate else {}
    output = model(**inputs, region_targets=[torch.zeros(1, 1, 1)] * len(rows), **targets)
    if has_gate:
        head, logits = model.zoom.gate.head, output.gate_logits
        scale = 1.5 / logits.std()
        head.weight.mul_(scale)
        head.bias.copy_((head.bias - logits.mean()) * scale)
    contrast = torch.stack([maps[0].std() for maps in output.region_logits]).mean()
    scorer = model.zoom.region.scorer
    for parameter in (scorer.q_proj if scorer.q_norm is None else scorer.q_norm).parameters():
        parameter.mul_(3.0 / contrast)


@dataclass
class Row:
    """One prompt: text pieces with `None` for an image, and its images' (height, width) in tokens."""

    pieces: list[str | None]
    grids: list[tuple[int, int]] = field(default_factory=list)
    seed: int = 0


def random_source(height: int, width: int, seed: int) -> torch.Tensor:
    """A smooth (3, height, width) uint8 image."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, max(2, height // 16), max(2, width // 16), generator=generator)
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (large[0] * 255).round().to(torch.uint8)


def make_inputs(family: str, rows: list[Row]) -> dict:
    """What a processor would return for the rows: left-padded ids, pixel values, grids and sources."""
    tokenizer = llava_tokenizer() if family == "llava" else qwen_tokenizer()
    patch = 16 if family == "qwen3_vl" else 14
    texts, pixels, thw, sources = [], [], [], []
    for row in rows:
        grids, text = iter(row.grids), ""
        for index, piece in enumerate(row.pieces):
            if piece is not None:
                text += piece
                continue
            height, width = (4, 4) if family == "llava" else next(grids)
            generator = torch.Generator().manual_seed(1000 * row.seed + index)
            if family == "llava":
                text += "<image>" * 16
                pixels.append(torch.randn(1, 3, 56, 56, generator=generator))
                sources.append(random_source(150 + 10 * row.seed % 70, 130, 7 * row.seed + index))
            else:
                text += "<|vision_start|>" + "<|image_pad|>" * (height * width) + "<|vision_end|>"
                thw.append([1, 2 * height, 2 * width])
                pixels.append(torch.randn(4 * height * width, 6 * patch * patch, generator=generator))
                sources.append(random_source(height * 60 + row.seed % 7, width * 55, 7 * row.seed + index))
        texts.append(text)
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
    if pixels:
        inputs |= {"pixel_values": torch.cat(pixels), "source_images": sources}
    if thw:
        inputs["image_grid_thw"] = torch.tensor(thw)
    if family != "llava":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return inputs


def plain_inputs(inputs: dict) -> dict:
    """The inputs without what only Q-Zoom takes."""
    return {key: value for key, value in inputs.items() if not key.startswith("source")}
