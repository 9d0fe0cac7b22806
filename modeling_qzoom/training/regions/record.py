"""Records of `label-regions`: a question about an image, the model's response, and where it looked meanwhile."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...zoom_regions_qzoom import Box, Rectangle


@dataclass(frozen=True, eq=False)
class RegionRecord:
    """One label of `label-regions`; thresholds apply when it is loaded.

    Attributes:
        id: id of the row.
        image_id: the same for rows about the same image.
        question: question of the row.
        answers: accepted answers of the row.
        response: what the model answered, without special tokens.
        grounding: (h, w) float32 mean attention of the grounding heads, in merged visual tokens.
        sinks: (h, w) float32 mean attention of the sink heads; zeros without any.
        box: (x0, y0, x1, y1) in source pixels that holds the answer, where the row knows it.
        image_size: (width, height) of the image in pixels.
        content: (x0, y0, x1, y1) in cells where the image is, if the rest of the grid is padding.
    """

    id: str
    image_id: str
    question: str
    answers: tuple[str, ...]
    response: str
    grounding: np.ndarray
    sinks: np.ndarray
    box: Box | None = None
    image_size: tuple[int, int] | None = None
    content: Rectangle | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the maps."""
        height, width = self.grounding.shape
        return height, width

    def to_row(self) -> dict[str, Any]:
        """The record by the columns of its file."""
        height, width = self.grid
        image_width, image_height = self.image_size or (None, None)
        return {
            "id": self.id,
            "image_id": self.image_id,
            "question": self.question,
            "answers": list(self.answers),
            "response": self.response,
            "height": height,
            "width": width,
            "grounding": self.grounding.flatten(),
            "sinks": self.sinks.flatten(),
            "box": None if self.box is None else list(self.box),
            "image_width": image_width,
            "image_height": image_height,
            "content": None if self.content is None else list(self.content),
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "RegionRecord":
        """The record of a row of its file; older files lack some of the last columns."""
        grid = row["height"], row["width"]
        width, height = row.get("image_width"), row.get("image_height")
        return cls(
            id=row["id"],
            image_id=row["image_id"],
            question=row["question"],
            answers=tuple(row["answers"]),
            response=row["response"],
            grounding=np.array(row["grounding"], dtype=np.float32).reshape(grid),
            sinks=np.array(row["sinks"], dtype=np.float32).reshape(grid),
            box=None if row.get("box") is None else tuple(row["box"]),
            image_size=None if width is None or height is None else (width, height),
            content=None if row.get("content") is None else tuple(row["content"]),
        )
