"""The prompt: where its images are, their features, its embeddings and its positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .backbones_qzoom import BackboneSpec, token_grid_of
from .configuration_qzoom import QZoomConfig
from .errors_qzoom import InputError
from .rows_qzoom import pick


@dataclass
class VisualFeatures:
    """Encoded images: `embeds[i]` (n_i, D) and, per DeepStack level, `deepstack[level][i]` (n_i, D)."""

    embeds: list[Tensor]
    deepstack: list[list[Tensor]]

    def pick(self, images: Sequence[int]) -> "VisualFeatures":
        """The features of some images."""
        levels = [[level[image] for image in images] for level in self.deepstack]
        return VisualFeatures([self.embeds[image] for image in images], levels)

    @classmethod
    def join(cls, parts: Sequence["VisualFeatures"]) -> "VisualFeatures":
        """The features of several groups of images, one behind the other."""
        levels = zip(*(part.deepstack for part in parts))
        return cls([image for part in parts for image in part.embeds], [sum(level, []) for level in levels])


def as_visual_features(encoded: Any) -> VisualFeatures:
    """Normalises what a VLM's `get_image_features` (or `get_video_features`) returned."""
    deepstack = getattr(encoded, "deepstack_features", None) or []
    return VisualFeatures(list(encoded.pooler_output), [list(level) for level in deepstack])


def encode_images(vlm: PreTrainedModel, pixel_values: Tensor, image_grid_thw: Tensor | None) -> VisualFeatures:
    """Runs the vision tower and projector."""
    grid = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw}
    return as_visual_features(vlm.get_image_features(pixel_values, return_dict=True, **grid))


def mismatch(kind: str, tokens: int, features: int) -> str:
    """The plain VLMs' sentence about prompts and images that do not belong together; `kind` is Image or Video."""
    return f"{kind} features and {kind.lower()} tokens do not match, tokens: {tokens}, features: {features}"


def check_visual_tokens(vlm_config: PreTrainedConfig, input_ids: Tensor, vision: dict[str, Any]) -> None:
    """Compares image and video tokens of prompts with the grids beside them, as far as both are there.

    Raises:
        InputError: there are more or fewer tokens than the grids have cells.
    """
    for kind in ("Image", "Video"):
        grids = vision.get(f"{kind.lower()}_grid_thw")
        if grids is None:
            continue
        tokens = int(torch.eq(input_ids, getattr(vlm_config, f"{kind.lower()}_token_id")).sum())
        if not tokens:  # of pixel values without a place the VLM itself complains
            continue
        features = int(grids.prod(-1).sum()) // token_grid_of(vlm_config).merge ** 2
        if tokens != features:
            raise InputError(mismatch(kind, tokens, features))


# what positions depend on besides ids and padding
POSITION_INPUTS = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def prompt_positions(
    vlm: PreTrainedModel, spec: BackboneSpec, input_ids: Tensor, attention_mask: Tensor, **vision: Any
) -> Tensor:
    """Positions of a prompt as the plain VLM makes them, without its side effect on the module.

    Args:
        input_ids, attention_mask: (B, N).
        vision: the `POSITION_INPUTS` that are present.

    Returns:
        (4, B, N) long for M-RoPE (text position, t, h, w), (B, N) long otherwise; pads hold 0.
    """
    text = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)  # (B, N)
    if not spec.mrope:
        return text
    has_grid = vision.get("image_grid_thw") is not None or vision.get("video_grid_thw") is not None
    if not has_grid:
        return text[None].expand(4, -1, -1)
    if vision.get("mm_token_type_ids") is None:
        types = (input_ids == vlm.config.image_token_id).int() + 2 * (input_ids == vlm.config.video_token_id).int()
        vision = {**vision, "mm_token_type_ids": types}
    check_visual_tokens(vlm.config, input_ids, vision)
    vlm = vlm.get_base_model() if hasattr(vlm, "get_base_model") else vlm  # a VLM in a wrapper of peft
    try:
        grid, _ = vlm.base_model.get_rope_index(input_ids, attention_mask=attention_mask, **vision)
    except StopIteration as error:  # which would silently end a loop over batches
        raise InputError(
            "the prompts hold more separate stretches of image or video tokens than there are grids in image_grid_thw "
            "or video_grid_thw. Were prompts and images processed together?"
        ) from error
    return torch.cat([text[None], grid.to(text)], dim=0)


def marker_ids(config: QZoomConfig) -> tuple[int, int] | None:
    """Ids of the tokens before and after an image, where the family has them."""
    spec = config.backbone
    if spec.image_start_token is None or spec.image_end_token is None:
        return None
    return getattr(config.vlm_config, spec.image_start_token), getattr(config.vlm_config, spec.image_end_token)


@dataclass
class ImageSpan:
    """One image of one row: columns [start, end) of the row, and its (height, width) in tokens."""

    start: int
    end: int
    grid: tuple[int, int]
    index: int  # among all images of the batch


def image_spans(input_ids: Tensor, image_token_id: int, grids: list[tuple[int, int]]) -> list[list[ImageSpan]]:
    """Finds every row's images.

    Args:
        input_ids: (B, N).
        grids: (height, width) in tokens of every image of the batch, in order of appearance.

    Returns:
        One list of spans per row.

    Raises:
        InputError: the rows' image tokens do not add up to the given images.
    """
    rows: list[list[ImageSpan]] = []
    index = 0
    for row, ids in enumerate((input_ids == image_token_id).cpu()):
        columns = ids.nonzero()[:, 0].tolist()
        spans: list[ImageSpan] = []
        used = 0
        while used < len(columns):
            place = f"row {row}, image {len(spans)}"
            if index == len(grids):
                raise InputError(f"{place}: the prompt has image tokens left but only {len(grids)} images were given.")
            height, width = grids[index]
            run = columns[used : used + height * width]
            if len(run) < height * width or run[-1] - run[0] != len(run) - 1:
                raise InputError(
                    f"{place}: an image of {height} × {width} tokens needs {height * width} image tokens in a row, "
                    f"the prompt has {len(run)} from column {run[0]} on. Were prompt and images processed together?"
                )
            spans.append(ImageSpan(run[0], run[-1] + 1, (height, width), index))
            used, index = used + len(run), index + 1
        rows.append(spans)
    if index != len(grids):
        raise InputError(f"{len(grids)} images were given, the prompts hold the tokens of {index}.")
    return rows


class DeepStack:
    """Visual features that Qwen3-VL adds to the hidden states after its first decoder layers.

    Args:
        levels: one (n, D) tensor per level, rows in order of the visual tokens in the batch.
        mask: (B, N) bool, the visual tokens.
    """

    def __init__(self, levels: list[Tensor], mask: Tensor):
        self.levels = levels
        self.mask = mask

    def select(self, rows: Sequence[int], length: int) -> "DeepStack":
        """The features of some rows, in ascending order, in their last `length` columns."""
        is_selected = torch.zeros_like(self.mask)
        is_selected[list(rows), self.mask.shape[1] - length :] = True
        keep = is_selected[self.mask]  # (n,)
        return DeepStack([level[keep.to(level.device)] for level in self.levels], pick(self.mask, rows)[:, -length:])

    def add(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Adds the features that belong after decoder layer `layer`, if any."""
        if layer >= len(self.levels):
            return hidden_states
        features = self.levels[layer].to(hidden_states.device, hidden_states.dtype)
        mask = self.mask.to(hidden_states.device)
        hidden_states = hidden_states.clone()
        hidden_states[mask, :] = hidden_states[mask, :] + features
        return hidden_states


def embed_prompt(
    vlm: PreTrainedModel, input_ids: Tensor, images: VisualFeatures | None, videos: VisualFeatures | None
) -> tuple[Tensor, DeepStack | None]:
    """Token embeddings with the visual ones in place.

    Args:
        input_ids: (B, N).

    Returns:
        (B, N, D) embeddings, and the DeepStack features in token order where the family has them.
    """
    embeds = vlm.get_input_embeddings()(input_ids)
    config = vlm.config
    parts: list[tuple[Tensor, VisualFeatures]] = []
    for kind, features, token_id in (
        ("Image", images, config.image_token_id),
        ("Video", videos, getattr(config, "video_token_id", None)),
    ):
        if features is None:
            continue
        mask = torch.eq(input_ids, cast(int, token_id))  # (B, N)
        flat = torch.cat([part.to(embeds.device, embeds.dtype) for part in features.embeds])  # (n, D)
        if int(mask.sum()) != len(flat):
            raise InputError(mismatch(kind, int(mask.sum()), len(flat)))
        embeds = embeds.masked_scatter(mask[..., None].to(embeds.device), flat)
        parts.append((mask, features))
    if not parts or not parts[0][1].deepstack:
        return embeds, None
    visual = torch.stack([mask for mask, _ in parts]).any(0)  # (B, N)
    levels = []
    for level in range(len(parts[0][1].deepstack)):
        first = parts[0][1].deepstack[level][0]  # (n, D)
        joint = first.new_zeros(int(visual.sum()), first.shape[-1])
        for mask, features in parts:
            flat = torch.cat([part.to(joint.device) for part in features.deepstack[level]])
            joint[mask[visual].to(joint.device)] = flat
        levels.append(joint)
    return embeds, DeepStack(levels, visual)


def prompt_images(config: QZoomConfig, input_ids: Tensor, image_grid_thw: Tensor | None) -> list[list[ImageSpan]]:
    """Where each row's images are.

    Raises:
        InputError: the prompts' image tokens do not add up to the images.
    """
    image_tokens = int((input_ids == config.image_token_id).sum())
    grids = token_grid_of(config.vlm_config).token_grids(image_tokens, image_grid_thw)
    return image_spans(input_ids, config.image_token_id, grids)
