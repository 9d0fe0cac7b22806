"""Tiny random models of every family, and requests that need neither network nor processor."""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForImageTextToText

from modeling_qzoom import QZoomForConditionalGeneration
from tests.families import FAMILY
from tests.families.llava import LLAVA
from tests.families.qwen import QWEN_SPECIALS, qwen_tokenizer
from tests.families.tokenizers import byte_tokenizer, random_source


__all__ = [
    "FAMILIES",
    "FAMILY",
    "QWEN_SPECIALS",
    "Row",
    "byte_tokenizer",
    "llava_tokenizer",
    "make_inputs",
    "plain_inputs",
    "qwen_tokenizer",
    "random_source",
    "tiny_model",
    "tiny_vlm",
    "vlm_config",
]

FAMILIES = tuple(FAMILY)
# every token in every layer, as in checkpoints that do not say otherwise
EVERY_TOKEN = {"gate_branch": "full", "region_branch": "full", "keep_share": 1.0}
llava_tokenizer = LLAVA.tokenizer


def vlm_config(family: str, layers: int = 6):
    """A configuration with real structure and small sizes."""
    return FAMILY[family].config(layers)


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
    model = QZoomForConditionalGeneration.from_backbone(
        tiny_vlm(family, seed, layers),
        branch_layer=branch_layer,
        branch_depth=branch_depth,
        zoom_config={**FAMILY[family].budget(), **EVERY_TOKEN, **zoom_config},
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


def make_inputs(family: str, rows: list[Row]) -> dict:
    """What a processor would return for the rows: left-padded ids, pixel values, grids and sources."""
    texts, images = [], []
    for row in rows:
        grids, text = iter(row.grids), ""
        for index, piece in enumerate(row.pieces):
            if piece is None:
                generator = torch.Generator().manual_seed(1000 * row.seed + index)
                images.append(FAMILY[family].draw_image(grids, 7 * row.seed + index, generator))
                piece = images[-1]["text"]
            text += piece
        texts.append(text)
    tokenizer = FAMILY[family].tokenizer()
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
    if images:
        inputs["pixel_values"] = torch.cat([image["pixel_values"] for image in images])
        inputs["source_images"] = [image["source"] for image in images]
        if "image_grid_thw" in images[0]:
            inputs["image_grid_thw"] = torch.tensor([image["image_grid_thw"] for image in images])
    return FAMILY[family].finish_inputs(inputs)


def plain_inputs(inputs: dict) -> dict:
    """The inputs without what only Q-Zoom takes."""
    return {key: value for key, value in inputs.items() if not key.startswith("source")}
