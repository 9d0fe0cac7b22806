"""What the data sets of both branches share: a row's image, and chats about it as the coarse pass gets them."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ...asking.budgets import Budget
from ...asking.chats import Turn, encode_prompts, render
from ...asking.session import Session
from ...data.rows import Row


class BranchDataset(Dataset[dict[str, Any]]):
    """Samples that show a branch the coarse view.

    Args:
        session: model whose processor makes the inputs, and the options of its prompts.
        rows: rows behind the labels, by id.
    """

    def __init__(self, session: Session, rows: dict[str, Row]) -> None:
        self.processor, self.prompts = session.processor, session.config
        self.vlm_config = session.model.config.vlm_config
        self.rows = rows

    def load_image(self, row_id: str) -> Image.Image:
        """The image of a row.

        Raises:
            ValueError: it cannot be read any more.
        """
        return self.rows[row_id].load_image(self.processor.max_source_pixels)

    def coarse_inputs(self, image: Image.Image, turns: Sequence[Turn], budget: Budget | None = None) -> dict[str, Any]:
        """Model inputs of one chat, without the original image, which only crops are cut from.

        Args:
            image: image that the chat is about.
            turns: questions in order, with the answers that are already given.
            budget: coarse budget; the processor's own by default.
        """
        features = encode_prompts(self.processor, [image], [render(self.processor, turns, self.prompts)], budget)
        return {name: value for name, value in features.items() if name not in ("source_images", "source_boxes")}
