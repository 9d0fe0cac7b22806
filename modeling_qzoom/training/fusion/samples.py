"""Samples of stage 2: a question, both views of its image, and the plain model's own answer as the target (III-D)."""

import logging
import random
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from ... import QZoomProcessor
from ...backbones_qzoom import spec_for_model_type
from ...data.rows import Row
from ...zoom_regions_qzoom import Box
from ..common.answer_inputs import encode_target
from ..common.trainer import Key
from .config import TrainFusionConfig
from .record import FusionRecord


logger = logging.getLogger(__name__)


def choose_records(records: Sequence[FusionRecord], anchor_share: float, seed: int) -> list[FusionRecord]:
    """The rows that got worse by zooming, and some that both ways got right.

    Args:
        records: labels of `mine-fusion`.
        anchor_share: share of the latter in the result; fewer where there are not that many.
        seed: seed of drawing them.

    Raises:
        ValueError: no row got worse.
    """
    worse = [record for record in records if record.regression]
    if not worse:
        raise ValueError(
            f"none of {len(records)} mined rows got worse by zooming: stage 2 is not needed for them. Go on with "
            "label-gates, or mine harder or more rows."
        )
    both = [record for record in records if record.plain_right and record.zoomed_right and record.box]
    count = round(len(worse) * anchor_share / (1 - anchor_share))
    if count > len(both):
        logger.warning("anchor_share asks for %d rows that both ways got right; there are %d", count, len(both))
    anchors = random.Random(seed).sample(both, min(count, len(both)))
    logger.info("%d rows that got worse by zooming, %d anchors", len(worse), len(anchors))
    return [*worse, *anchors]


def random_box(size: tuple[int, int], side: Sequence[float], smallest: int, rng: random.Random) -> Box:
    """A box anywhere in an image.

    Args:
        size: (width, height) in pixels.
        side: range of its sides as shares of the image's.
        smallest: least side in pixels, as far as the image has it.
        rng: source of the draws.
    """
    spans = []
    for length in size:
        extent = min(length, max(smallest, round(rng.uniform(*side) * length)))
        start = rng.randint(0, length - extent)
        spans.append((start, start + extent))
    (x0, x1), (y0, y1) = spans
    return x0, y0, x1, y1


class FusionSamples(Dataset[dict[str, Any]]):
    """Model inputs of rows, one by one.

    Args:
        processor: processor at the stage's coarse budget.
        records: labels of the rows, from `choose_records`.
        rows: rows that they were made from, by id.
        config: options with prompts, `random_box_share`, `random_box_side` and `seed`.
    """

    def __init__(
        self,
        processor: QZoomProcessor,
        records: Sequence[FusionRecord],
        rows: dict[str, Row],
        config: TrainFusionConfig,
    ) -> None:
        self.processor, self.records, self.rows, self.config = processor, list(records), rows, config

    def __len__(self) -> int:
        return len(self.records)

    def box(self, epoch: int, index: int, size: tuple[int, int]) -> Box:
        """Where a sample looks in an epoch: at the mined box, or at a random one.

        Args:
            epoch: number of the epoch.
            index: place of the sample.
            size: (width, height) of the image in pixels.
        """
        record = self.records[index]
        rng = random.Random(f"{self.config.seed}/{epoch}/{record.id}")
        # a record without a box is never trained on; without this check a type checker does not know it
        if rng.random() < self.config.random_box_share or record.box is None:
            smallest = spec_for_model_type(self.processor.backbone_model_type).min_box_side
            return random_box(size, self.config.random_box_side, smallest, rng)
        return record.box

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Inputs of the sample `key[1]` in epoch `key[0]`, with `labels` (1, n) and its `zoom_boxes`.

        Raises:
            ValueError: its image cannot be read any more.
        """
        epoch, index = key
        record = self.records[index]
        image = self.rows[record.id].load_image(self.processor.max_source_pixels)
        feature = encode_target(self.processor, image, record.question, record.plain, self.config)
        return {**feature, "zoom_boxes": [self.box(epoch, index, image.size)]}
