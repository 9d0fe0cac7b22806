"""What happened to one prompt row."""

from dataclasses import dataclass, field, fields
from typing import Any

from PIL import Image
from torch import Tensor

from .zoom_regions_qzoom import Box, Rectangle


REASONS = (
    "gate_open",
    "gate_closed",
    "gate_nan",
    "forced",
    "off",
    "no_image",
    "video",
    "empty_map",
    "map_nan",
    "crop_failed",
)


@dataclass(repr=False)
class ZoomReport:
    """Whether, why and where one row was zoomed; Python numbers and CPU float32 tensors.

    A report keeps no image. `report.overlay(image)` draws it over one; `print(report)` draws the heat map in text; a
    notebook shows caption and heat map.

    Attributes:
        gate_probability: probability that the coarse view is not enough; None where the gate did not run or made no
            number.
        zoomed: whether a crop was used.
        reason: `gate_open` or `forced` (zoomed; forced by zoom="always" or for lack of a gate); `gate_closed`, `off`
            (zoom="never"), `no_image`, `video`, `empty_map` (no region, see `empty_rule`), `crop_failed` (the region
            lies in the padding or is too narrow), `gate_nan` or `map_nan` (a branch computed NaN: damaged weights, or
            a number format that is too narrow) (not zoomed).
        image_index: which of the row's images was looked at, None if none was.
        box: (x0, y0, x1, y1) in pixels of that image, end exclusive; None without a region.
        region_logits: (h, w) region logits of that image, None where the region branch did not run.
        heatmap: (h, w) in [0, 1]: the logits after sigmoid, artifact rule and blur.
        coarse_tokens: visual tokens of the row's prompt.
        crop_tokens: visual tokens of the crop, 0 without one.
        grid_box: rectangle of source pixels that the map covers; None for the whole image.
        vision: the configuration of VISOR that the row ran under; "dense" for the plain layers.
        has_gate: whether the checkpoint has a gate, which tells zoom="always" from a checkpoint without one; None if
            not recorded. A fact about the model, not about the row, so reports compare without it.
        empty_rule: the option whose rule left an `empty_map` without a region: `region_threshold` (no cell above it),
            `region_min_peak` or `region_min_contrast` (the map's peak is too low); None for other rows.
    """

    gate_probability: float | None = None
    zoomed: bool = False
    reason: str = "off"
    image_index: int | None = None
    box: Box | None = None
    region_logits: Tensor | None = None
    heatmap: Tensor | None = None
    coarse_tokens: int = 0
    crop_tokens: int = 0
    grid_box: Rectangle | None = None
    has_gate: bool | None = field(default=None, compare=False)
    empty_rule: str | None = None
    vision: str = "dense"

    def __repr__(self) -> str:
        """One line: what differs from a row that nobody looked at, tensors by their shape."""
        parts = [f"reason={self.reason!r}", f"zoomed={self.zoomed}"]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                parts.append(f"{entry.name}=<{tuple(value.shape)}>")
            elif entry.name not in ("reason", "zoomed") and value != entry.default:
                parts.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __str__(self) -> str:
        """Caption and heat map in text; see `report_drawing_qzoom.text_picture`."""
        from .report_drawing_qzoom import text_picture

        return text_picture(self)

    def to_dict(self, *, maps: bool = False) -> dict[str, Any]:
        """The report as JSON can hold it.

        Args:
            maps: also `region_logits` and `heatmap`, as lists of rows.
        """
        values: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("region_logits", "heatmap"):
                if maps:
                    values[entry.name] = None if value is None else value.tolist()
            else:
                values[entry.name] = list(value) if isinstance(value, tuple) else value
        return values

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from .report_drawing_qzoom import notebook_html

        return notebook_html(self)

    def overlay(self, image: Any, **kwargs: Any) -> Image.Image:
        """The image with heat map, box and a caption; see `report_drawing_qzoom.overlay`.

        Args:
            image: the source image, PIL or uint8 tensor (3, H, W).
        """
        from .report_drawing_qzoom import overlay

        return overlay(image, self, **kwargs)
