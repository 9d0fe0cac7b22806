"""What a row costs before its first new token: FLOPs in closed form under the options in force.

Everything is read from the configuration, so nothing has to be loaded. `cost_decoder_qzoom` says what counts.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from .backbone_grids_qzoom import Size
from .configuration_qzoom import QZoomConfig
from .cost_decoder_qzoom import LayerCost
from .cost_vision_qzoom import VisionCost
from .errors_qzoom import InputError
from .report_qzoom import ZoomReport
from .zoom_crops_qzoom import CropRecipe, crop_recipe
from .zoom_options_qzoom import ZoomOptions


@dataclass(frozen=True)
class Prompt:
    """Lengths of a prompt with one image.

    Attributes:
        tokens: its length in tokens, visual tokens included.
        suffix: number of tokens after the image and its end marker.
        grid: (height, width) of the image in merged visual tokens.
    """

    tokens: int
    suffix: int
    grid: Size

    @property
    def visual(self) -> int:
        """Number of visual tokens of the coarse image."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Number of tokens up to the image's end marker, which a second pass or another question need not run."""
        return self.tokens - self.suffix


class PrefillCost:
    """FLOPs of a whole prefill, vision tower included, of rows with one image.

    Args:
        config: the model's configuration.
        options: options in force; they say which tokens cross which layers, and set the crop's budget.
    """

    def __init__(self, config: QZoomConfig, options: ZoomOptions):
        self.config, self.options = config, options
        self.vision, self.layers = VisionCost(config), LayerCost(config.get_text_config())
        self.below_k, self.depth = config.branch_layer, config.branch_depth
        self.above_k: int = config.get_text_config().num_hidden_layers - config.branch_layer
        self.markers = 0 if config.backbone.image_start_token is None else 2

    @cached_property
    def recipe(self) -> CropRecipe:
        """How crops are made.

        Raises:
            InputError: the crop's budget is unknown.
        """
        return crop_recipe(self.config, self.options)

    def plain(self, prompt: Prompt) -> int:
        """FLOPs of the plain VLM, and of a row with zoom="never"."""
        count = self.below_k + self.above_k
        return self.vision(prompt.grid) + count * self.layers.of_all(prompt.tokens) + self.layers.head()

    def skipped(self, prompt: Prompt, *, gate: bool = True, region: bool = False) -> int:
        """FLOPs of a row that could have zoomed and keeps the coarse view.

        Args:
            prompt: lengths of the row's prompt.
            gate: whether the gate branch ran.
            region: whether the region branch ran, and no crop came of it.
        """
        branches = (self.gate(prompt) if gate else 0) + (self.region(prompt) if region else 0)
        return self._coarse(prompt) + branches + self._above(prompt.tokens) + self.layers.head()

    def zoomed(self, prompt: Prompt, crop: Size, gate: bool = True) -> int:
        """FLOPs of a row that zooms: the prefix crosses no layer twice, what follows crosses layers [0, K) twice.

        Args:
            prompt: lengths of the row's prompt.
            crop: (height, width) of the crop in merged visual tokens.
            gate: whether the gate branch ran; with zoom="always" it does not.
        """
        inserted = crop[0] * crop[1] + self.markers
        fused = prompt.tokens + inserted
        first = self._coarse(prompt) + self.region(prompt) + (self.gate(prompt) if gate else 0)
        chunk = self.below_k * self.layers.layer(inserted + prompt.suffix, fused)
        above = self._above(fused - prompt.visual + self.kept(prompt.visual))
        return first + self.vision(crop) + chunk + above + self.layers.head()

    def kept(self, visual: int) -> int:
        """How many of so many coarse tokens stay above layer K in a row that zooms."""
        return math.ceil(self.options.keep_share * visual)

    def gate(self, prompt: Prompt) -> int:
        """FLOPs of the gate branch: its T layers over the prompt."""
        inner, last = self._branch_layer(prompt, self.options.gate_branch), self.layers.of_last(prompt.tokens)
        return (self.depth - 1) * inner + (last if self.options.skips_unread else inner)

    def region(self, prompt: Prompt) -> int:
        """FLOPs of the region branch: T - 1 layers, then the map."""
        inner = self._branch_layer(prompt, self.options.region_branch)
        return (self.depth - 1) * inner + self.layers.scorer(prompt.visual)

    def page(self, prompt: Prompt) -> int:
        """FLOPs of reading once what the questions about one page share: the prompt up to the image's end marker.

        In the last decoder layer, and in the gate's, only keys and values of it are made.
        """
        known, end = prompt.prefix, self.layers.keys_and_values(prompt.prefix)
        count = self.below_k + self.above_k - 1
        flops = self.vision(prompt.grid) + count * self.layers.of_all(known) + end
        if self.config.has_gate:
            inner = self.layers.of_all(known)
            if self.options.gate_branch == "light":
                inner = self._page_text(prompt)
            flops += (self.depth - 1) * inner + end
        return flops

    def question(self, prompt: Prompt) -> int:
        """FLOPs of a question about a page that has been read, whose gate stays closed: the rest of the prompt."""
        inner = self.layers.layer(prompt.suffix, prompt.tokens)
        last = self.layers.of_last(prompt.suffix, prompt.prefix) if self.options.skips_unread else inner
        count = self.below_k + self.above_k - 1
        gate = (self.depth - 1) * inner + last if self.config.has_gate else 0
        return count * inner + last + gate + self.layers.head()

    def of_report(self, prompt: Prompt, report: ZoomReport) -> int:
        """FLOPs of a row's prefill as its report tells: plain, skipped, zoomed or without a crop."""
        gate = report.gate_probability is not None or report.reason == "gate_nan"
        if report.zoomed:
            return self.zoomed(prompt, self.crop_grid(report), gate)
        region = report.reason in ("empty_map", "map_nan", "crop_failed")
        return self.skipped(prompt, gate=gate, region=region) if gate or region else self.plain(prompt)

    def crop_grid(self, report: ZoomReport) -> Size:
        """(height, width) of the crop that a report's box makes.

        Raises:
            InputError: the row was not zoomed, or the crop's budget is unknown.
        """
        if report.box is None:
            raise InputError("a row that was not zoomed has no crop.")
        x0, y0, x1, y1 = report.box
        return self.recipe.tokens(y1 - y0, x1 - x0)

    def _coarse(self, prompt: Prompt) -> int:
        """Vision tower and layers [0, K) over the prompt."""
        return self.vision(prompt.grid) + self.below_k * self.layers.of_all(prompt.tokens)

    def _above(self, length: int) -> int:
        """Layers [K, L) over so many tokens of a call that may zoom."""
        last = self.layers.of_last(length) if self.options.skips_unread else self.layers.of_all(length)
        return (self.above_k - 1) * self.layers.of_all(length) + last

    def _branch_layer(self, prompt: Prompt, kind: str) -> int:
        """One layer of a branch over the prompt, full or light."""
        if kind == "full":
            return self.layers.of_all(prompt.tokens)
        after = prompt.suffix + self.markers // 2
        return self.layers.of_text(prompt.tokens - prompt.visual - after, prompt.visual, after)

    def _page_text(self, prompt: Prompt) -> int:
        """One layer of a light branch over the prompt up to the image's end marker."""
        after = self.markers // 2
        before = prompt.prefix - prompt.visual - after
        text = self.layers.layer(before, before) + self.layers.layer(after, prompt.prefix)
        return text + self.layers.keys_and_values(prompt.visual)
