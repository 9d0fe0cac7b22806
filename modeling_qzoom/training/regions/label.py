"""`label-regions`, the data of stage 1: raw maps of where the model looks while it answers (paper III-C2).

Nothing is decided here: thresholds apply when the maps are loaded (`region_labels.load_region_targets`).
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...asking.chats import encode_prompts, render
from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session
from ...data.bad_rows import BadRows
from ...data.readers import load_rows
from ...data.rows import Row
from ...zoom_regions_qzoom import pixels_to_cells
from ..common.config_files import build_config, read_yaml
from ..common.label_store import Manifest, data_settings, make_labels
from .attention import check_heads, count_heads, look
from .config import Heads, LabelRegionsConfig


logger = logging.getLogger(__name__)

STAGE = "label-regions"
_HEAD_FIELDS = ("grounding_heads", "sink_heads", "query_tokens")


def with_heads(config: LabelRegionsConfig, backbone: str) -> LabelRegionsConfig:
    """The configuration with the heads of its file.

    Args:
        backbone: Fingerprint of the model, which the file's should equal.

    Raises:
        ValueError: Neither a file nor a table of heads, both, or a file that holds none.
    """
    if config.heads is None:
        if not count_heads(config.grounding_heads):
            raise ValueError(
                "Which heads to read is not said: run find-heads and give its file as heads=FILE, or list "
                "grounding_heads by layer."
            )
        return config
    if config.grounding_heads or config.sink_heads:
        raise ValueError("heads=FILE and the tables grounding_heads and sink_heads exclude each other.")
    held = read_yaml(config.heads)
    if not isinstance(held, dict) or not held.get("grounding_heads"):
        raise ValueError(f"heads={config.heads} holds no grounding_heads; it is not a file of find-heads.")
    try:
        found = build_config(LabelRegionsConfig, {name: held[name] for name in _HEAD_FIELDS if name in held})
    except ValueError as error:
        raise ValueError(f"heads={config.heads}: {error}") from error
    if held.get("backbone") not in (None, backbone):
        logger.warning(
            "heads=%s were found on another backbone; find-heads on this one may choose others", config.heads
        )
    return dataclasses.replace(config, **{name: getattr(found, name) for name in _HEAD_FIELDS})


def _encode(session: Session, rows: Sequence[Row], bad: BadRows) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows that can be used, and their inputs one by one."""
    usable, features = [], []
    images: dict[str, Image.Image] = {}
    for row in rows:
        text = render(session.processor, [(row.question, None)], session.config)
        try:
            if row.image_id not in images:
                images[row.image_id] = row.load_image(session.processor.max_source_pixels)
            features.append(encode_prompts(session.processor, [images[row.image_id]], [text]))
        except ValueError as error:
            bad.add(row.id, str(error).removeprefix(f"row {row.id}: "))
            continue
        usable.append(row)
    return usable, features


def _geometry(feature: dict[str, Any], grid: tuple[int, int]) -> dict[str, Any]:
    """Size of the image, and where it lies on the grid (in cells) if the rest of that is padding."""
    height, width = feature["source_images"][0].shape[1:]
    content = None
    if "source_boxes" in feature:
        covered = feature["source_boxes"][0].tolist()
        content = list(pixels_to_cells((0, 0, width, height), grid, (height, width), covered))
    return {"image_width": width, "image_height": height, "content": content}


@dataclasses.dataclass
class RegionLabeler:
    """Labels the rows of a shard.

    Args:
        session: The model.
        config: With its heads.
    """

    session: Session
    config: LabelRegionsConfig

    def __call__(self, rows: Sequence[Row], bad: BadRows) -> list[dict[str, Any]]:
        """The records of the usable rows, in order."""
        records = []
        for start in range(0, len(rows), self.config.batch_size):
            usable, features = _encode(self.session, rows[start : start + self.config.batch_size], bad)
            if usable:
                records += self._label(usable, features, bad)
        return records

    def _label(self, rows: list[Row], features: list[dict[str, Any]], bad: BadRows) -> list[dict[str, Any]]:
        config = self.config
        heads = _merged(config.grounding_heads, config.sink_heads)
        records = []
        looks = look(self.session, features, [row.image_id for row in rows], heads, config.query_tokens)
        for row, feature, seen in zip(rows, features, looks, strict=True):
            if seen.attention is None:
                bad.add(row.id, "the model's response is empty, or cut off after one token")
                continue
            grid = (seen.attention.shape[1], seen.attention.shape[2])
            records.append(
                {
                    "id": row.id,
                    "image_id": row.image_id,
                    "question": row.question,
                    "answers": list(row.answers),
                    "response": seen.response,
                    "height": grid[0],
                    "width": grid[1],
                    "grounding": _mean(seen.attention, heads, config.grounding_heads),
                    "sinks": _mean(seen.attention, heads, config.sink_heads),
                    "box": None if row.box is None else list(row.box),
                    **_geometry(feature, grid),
                }
            )
        return records


def _merged(first: Heads, second: Heads) -> Heads:
    """A table with the heads of both."""
    return {
        layer: list(dict.fromkeys([*first.get(layer, []), *second.get(layer, [])]))
        for layer in sorted({*first, *second})
    }


def _mean(maps: Tensor, heads: Heads, chosen: Heads) -> np.ndarray:
    """(h · w) float32 mean over some of the heads that the maps (heads, h, w) are of; zeros over none."""
    places = [(layer, head) for layer in sorted(heads) for head in heads[layer]]
    wanted = [places.index((layer, head)) for layer in chosen for head in chosen[layer]]
    mean = maps[wanted].mean(0) if wanted else torch.zeros_like(maps[0])
    return mean.flatten().numpy()


def _settings(config: LabelRegionsConfig, session: Session) -> dict[str, Any]:
    """Everything that labels depend on besides the model and the contents of rows."""
    names = ("prompt_suffix", "system_prompt", "max_new_tokens", "dtype", "batch_size", *_HEAD_FIELDS)
    budget = {name: getattr(session.processor, name) for name in ("min_tokens", "max_tokens")}
    return {**data_settings(config), **{name: getattr(config, name) for name in names}, **budget}


def run(config: LabelRegionsConfig) -> None:
    """Label the rows into `config.output`, going on where it was stopped.

    Raises:
        ValueError: Heads are missing or not the model's, or data or output do not fit.
    """
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}.")
    rows = load_rows(config)
    session = open_session(config)
    backbone = backbone_fingerprint(session.model)
    config = with_heads(config, backbone)
    check_heads(session.model, _merged(config.grounding_heads, config.sink_heads))
    manifest = Manifest(STAGE, backbone, rows.fingerprint, _settings(config, session))
    make_labels(config.output, manifest, rows, config.shard_size, RegionLabeler(session, config))
