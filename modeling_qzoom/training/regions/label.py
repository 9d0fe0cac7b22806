"""`label-regions`, the data of stage 1: raw maps of where the model looks while it answers (paper III-C2).

Nothing is decided here: thresholds apply when the maps are loaded (`rule.load_region_targets`).
"""

import dataclasses
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...asking.chats import encode_prompts, render
from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session
from ...data.readers import load_rows
from ...data.rows import Row
from ...zoom_regions_qzoom import Rectangle, pixels_to_cells
from ..common.config_files import build_config, read_yaml
from ..common.label_store import Manifest, data_settings, make_labels
from ..common.labelling import Labeler
from .config import Heads, LabelRegionsConfig
from .heads import check_heads, count_heads, merge_heads
from .look import Look, look
from .record import RegionRecord


logger = logging.getLogger(__name__)

STAGE = "label-regions"
_HEAD_FIELDS = ("grounding_heads", "sink_heads", "query_tokens")


def with_heads(config: LabelRegionsConfig, backbone: str) -> LabelRegionsConfig:
    """The configuration with the heads of its file.

    Args:
        config: options of the stage.
        backbone: fingerprint of the model, which the file's should equal.

    Raises:
        ValueError: neither a file nor a table of heads, both, or a file that holds none.
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
    stored = read_yaml(config.heads)
    if not isinstance(stored, dict) or not stored.get("grounding_heads"):
        raise ValueError(f"heads={config.heads} holds no grounding_heads; it is not a file of find-heads.")
    try:
        heads = build_config(LabelRegionsConfig, {name: stored[name] for name in _HEAD_FIELDS if name in stored})
    except ValueError as error:
        raise ValueError(f"heads={config.heads}: {error}") from error
    if stored.get("backbone") not in (None, backbone):
        logger.warning(
            "heads=%s were found on another backbone; find-heads on this one may choose others", config.heads
        )
    return dataclasses.replace(config, **{name: getattr(heads, name) for name in _HEAD_FIELDS})


def _content(feature: dict[str, Any], grid: tuple[int, int]) -> Rectangle | None:
    """Where the image lies on the grid, in cells, if the rest of that is padding."""
    if "source_boxes" not in feature:
        return None
    height, width = feature["source_images"][0].shape[1:]
    return pixels_to_cells((0, 0, width, height), grid, (height, width), feature["source_boxes"][0].tolist())


class RegionLabeler(Labeler[tuple[Row, dict[str, Any]], RegionRecord]):
    """Labels the rows of a shard with where the model looks.

    Args:
        session: the model.
        config: options of the stage, with the heads to read.
    """

    def __init__(self, session: Session, config: LabelRegionsConfig) -> None:
        super().__init__(session, config.batch_size)
        self.config = config

    def load(self, row: Row) -> tuple[Row, dict[str, Any]]:
        """The row and its model inputs."""
        text = render(self.session.processor, [(row.question, None)], self.session.config)
        return row, encode_prompts(self.session.processor, [self.image_of(row)], [text])

    def label(self, batch: list[tuple[Row, dict[str, Any]]]) -> list[RegionRecord | str]:
        """A record for each row, or why the model's response says nothing."""
        config, (rows, features) = self.config, zip(*batch, strict=True)
        heads = merge_heads(config.grounding_heads, config.sink_heads)
        looks = look(self.session, features, [row.image_id for row in rows], heads, config.query_tokens)
        return [self._record(*entry, heads) for entry in zip(rows, features, looks, strict=True)]

    def _record(self, row: Row, feature: dict[str, Any], seen: Look, heads: Heads) -> RegionRecord | str:
        if seen.attention is None:
            return "the model's response is empty, or cut off after one token"
        grid = (seen.attention.shape[1], seen.attention.shape[2])
        height, width = feature["source_images"][0].shape[1:]
        return RegionRecord(
            id=row.id,
            image_id=row.image_id,
            question=row.question,
            answers=row.answers,
            response=seen.response,
            grounding=_mean(seen.attention, heads, self.config.grounding_heads),
            sinks=_mean(seen.attention, heads, self.config.sink_heads),
            box=row.box,
            image_size=(width, height),
            content=_content(feature, grid),
        )


def _mean(maps: Tensor, heads: Heads, some: Heads) -> np.ndarray:
    """(h, w) float32 mean over some of the heads that the maps (heads, h, w) are of; zeros over none."""
    places = [(layer, head) for layer in sorted(heads) for head in heads[layer]]
    indices = [places.index((layer, head)) for layer in some for head in some[layer]]
    mean = maps[indices].mean(0) if indices else torch.zeros_like(maps[0])
    return mean.numpy()


def _settings(config: LabelRegionsConfig, session: Session) -> dict[str, Any]:
    """Everything that labels depend on besides the model and the contents of rows."""
    names = ("prompt_suffix", "system_prompt", "max_new_tokens", "dtype", "batch_size", *_HEAD_FIELDS)
    budget = {name: getattr(session.processor, name) for name in ("min_tokens", "max_tokens")}
    return {**data_settings(config), **{name: getattr(config, name) for name in names}, **budget}


def run(config: LabelRegionsConfig) -> None:
    """Label the rows into `config.output`, going on where it was stopped.

    Raises:
        ValueError: heads are missing or not the model's, or data or output do not fit.
    """
    rows = load_rows(config)
    session = open_session(config)
    backbone = backbone_fingerprint(session.model)
    config = with_heads(config, backbone)
    check_heads(session.model, merge_heads(config.grounding_heads, config.sink_heads))
    manifest = Manifest(STAGE, backbone, rows.fingerprint, _settings(config, session))
    make_labels(config.output, manifest, rows, config.shard_size, RegionLabeler(session, config))
