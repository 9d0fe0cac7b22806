"""Samples of `train-vision`: a question about an image and its first accepted answer."""

from typing import Any

from torch.utils.data import Dataset

from ...asking.session import Session
from ..common.answer_inputs import encode_target
from ..common.answered import EpochRows
from ..common.trainer import Key


class AnswerSamples(Dataset[dict[str, Any]]):
    """Model inputs of rows, one by one.

    Args:
        session: model whose processor makes the inputs, and the options of its prompts.
        rows: rows with answers.
    """

    def __init__(self, session: Session, rows: EpochRows) -> None:
        self.processor, self.prompts, self.rows = session.processor, session.config, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Inputs of the row in the place `key[1]` of epoch `key[0]`, with `labels` (1, n) on its answer.

        Raises:
            ValueError: its image cannot be read any more.
        """
        row = self.rows.row(*key)
        image = row.load_image(self.processor.max_source_pixels)
        feature = encode_target(self.processor, image, row.question, row.answers[0], self.prompts)
        return {name: value for name, value in feature.items() if name not in ("source_images", "source_boxes")}
