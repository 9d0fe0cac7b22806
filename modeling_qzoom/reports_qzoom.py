"""What happened to one prompt row."""

from dataclasses import dataclass

from torch import Tensor

from .regions_qzoom import Box, Rectangle


REASONS = ("gate_open", "gate_closed", "forced", "off", "no_image", "video", "empty_map", "crop_failed")


@dataclass
class ZoomReport:
    """Whether, why and where one row was zoomed; Python numbers and CPU float32 tensors.

    Attributes:
        gate_probability: probability that the coarse view is not enough; None where the gate did not run.
        zoomed: whether a crop was used.
        reason: `gate_open` or `forced` (zoomed; forced by zoom="always" or for lack of a gate); `gate_closed`, `off`
            (zoom="never"), `no_image`, `video`, `empty_map` (no cell above the threshold) or `crop_failed` (the region
            lies in the padding or is too narrow) (not zoomed).
        image_index: which of the row's images was looked at, None if none was.
        box: (x0, y0, x1, y1) in pixels of that image, end exclusive; None without a region.
        region_logits: (h, w) region logits of that image, None where the region branch did not run.
        heatmap: (h, w) in [0, 1]: the logits after sigmoid, artifact rule and blur.
        coarse_tokens: visual tokens of the row's prompt.
        crop_tokens: visual tokens of the crop, 0 without one.
        grid_box: rectangle of source pixels that the map covers; None for the whole image.
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

    def overlay(self, image, **kwargs):
        """The image with heat map, box and a caption; see `visualization_qzoom.overlay`.

        Args:
            image: the source image, PIL or uint8 tensor (3, H, W).
        """
        from .visualization_qzoom import overlay

        return overlay(image, self, **kwargs)
