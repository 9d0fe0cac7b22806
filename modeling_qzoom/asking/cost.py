"""What a row costs before its first new token: FLOPs in closed form, read from the configuration.

A multiplication and its addition are two FLOPs. Matrix products count, causal attention counts full, and what is
smaller by orders of magnitude (norms, activations, rotary tables) does not. Lengths are in tokens of the decoder,
grids are (height, width) in merged visual tokens.
"""

from dataclasses import dataclass

from .. import QZoomConfig, ZoomReport
from ..backbones_qzoom import token_grid_of
from ..zoom_crops_qzoom import CropRecipe, crop_recipe
from ..zoom_options_qzoom import ZoomOptions
from .answers import Answer


Grid = tuple[int, int]


def _layer(queries: int, keys: int, width: int, heads: int, kv_heads: int, mlp: int) -> int:
    """One transformer layer without its MLP's weights: `heads` and `kv_heads` in channels, `mlp` FLOPs a token."""
    projections = 2 * 2 * queries * width * (heads + kv_heads)
    return projections + 2 * 2 * queries * keys * heads + queries * mlp


class DecoderCost:
    """FLOPs of the decoder and of both branches.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: QZoomConfig):
        text = config.get_text_config()
        self.layers, self.branch_layer, self.branch_depth = (
            text.num_hidden_layers,
            config.branch_layer,
            config.branch_depth,
        )
        self.hidden, self.vocabulary = text.hidden_size, text.vocab_size
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or self.hidden // self.heads
        self.mlp = 3 * 2 * self.hidden * text.intermediate_size

    def layer(self, queries: int, keys: int) -> int:
        """FLOPs of one layer over `queries` tokens that attend to `keys` tokens."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return _layer(queries, keys, self.hidden, heads, kv_heads, self.mlp)

    def below(self, prompt: int) -> int:
        """FLOPs of the layers [0, K) over a prompt."""
        return self.branch_layer * self.layer(prompt, prompt)

    def above(self, length: int) -> int:
        """FLOPs of the layers [K, L) over so many tokens."""
        return (self.layers - self.branch_layer) * self.layer(length, length)

    def head(self) -> int:
        """FLOPs of the logits of one token."""
        return 2 * self.hidden * self.vocabulary

    def gate(self, prompt: int) -> int:
        """FLOPs of the gate branch: its T layers over the prompt."""
        return self.branch_depth * self.layer(prompt, prompt)

    def region(self, prompt: int, visual: int) -> int:
        """FLOPs of the region branch: T - 1 layers, then the map.

        Queries of two tokens, keys of all visual tokens, and their products make the map.
        """
        projections = 2 * self.hidden * self.head_dim * (2 * self.heads + visual * self.kv_heads)
        products = 2 * 2 * visual * self.head_dim * (self.heads + 1)
        return (self.branch_depth - 1) * self.layer(prompt, prompt) + projections + products

    def second_pass(self, chunk: int, fused: int) -> int:
        """FLOPs of the second pass.

        Layers [0, K) run for the `chunk` tokens that no prefix covers, layers [K, L) for all `fused` tokens.
        """
        return self.branch_layer * self.layer(chunk, fused) + self.above(fused)


class VisionCost:
    """FLOPs of the vision tower and projector for one image.

    Towers are told apart by what their configuration holds: windows (Qwen2.5-VL), DeepStack levels (Qwen3-VL), or
    neither (CLIP, one fixed grid).

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: QZoomConfig):
        self.vlm, vision = config.vlm_config, config.vision_config
        self.vision = vision
        self.geometry = token_grid_of(config.vlm_config)
        self.width: int = vision.hidden_size
        self.windowed = hasattr(vision, "fullatt_block_indexes")
        self.pooled = not hasattr(vision, "depth")  # CLIP calls it num_hidden_layers
        self.output = config.get_text_config().hidden_size
        channels: int = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
        self.pixels = channels * self.geometry.temporal_patch * self.geometry.patch**2

    def __call__(self, grid: Grid) -> int:
        """FLOPs of one image of this grid."""
        patches = grid[0] * grid[1] * self.geometry.merge**2
        embedding = 2 * patches * self.pixels * self.width
        if self.pooled:
            return embedding + self._clip(patches)
        matrices = 3 if self.windowed else 2  # the MLP of the windowed tower is gated
        mlp = matrices * 2 * self.width * self.vision.intermediate_size
        linear = self.vision.depth * _layer(patches, 0, self.width, self.width, self.width, mlp)
        attention = sum(4 * self.width * self._pairs(grid, block) for block in range(self.vision.depth))
        mergers = 1 + len(getattr(self.vision, "deepstack_visual_indexes", None) or ())
        merged = self.width * self.geometry.merge**2
        merger = 2 * grid[0] * grid[1] * merged * (merged + self.output)
        return embedding + linear + attention + mergers * merger

    def _pairs(self, grid: Grid, block: int) -> int:
        """Pairs of patches that attend to each other in a block."""
        per_token = self.geometry.merge**2
        if not self.windowed or block in self.vision.fullatt_block_indexes:
            return (grid[0] * grid[1] * per_token) ** 2
        side = self.vision.window_size // self.geometry.token_side
        heights, widths = ([min(side, n - start) for start in range(0, n, side)] for n in grid)
        return sum((h * w * per_token) ** 2 for h in heights for w in widths)

    def _clip(self, patches: int) -> int:
        """Layers over the patches and the class token, then a projector of two matrices."""
        tokens, mlp = patches + 1, 2 * 2 * self.width * self.vision.intermediate_size
        layer = _layer(tokens, tokens, self.width, self.width, self.width, mlp)
        layers = self.vlm.vision_feature_layer
        features = self.width * (1 if isinstance(layers, int) else len(layers))
        return self.vision.num_hidden_layers * layer + 2 * patches * self.output * (features + self.output)


@dataclass(frozen=True)
class Prompt:
    """Lengths of a prompt with one image.

    Args:
        tokens: its length in tokens, visual tokens included.
        suffix: number of tokens after the image and its end marker.
        grid: (height, width) of the image in merged visual tokens.
    """

    tokens: int
    suffix: int
    grid: Grid

    @property
    def visual(self) -> int:
        """Number of visual tokens of the coarse image."""
        return self.grid[0] * self.grid[1]


class PrefillCost:
    """FLOPs of a whole prefill, vision tower included, of rows with one image.

    Args:
        config: the model's configuration.
        options: options in force; they set the crop's budget.

    Raises:
        ValueError: the crop's budget is unknown.
    """

    def __init__(self, config: QZoomConfig, options: ZoomOptions):
        self.vision, self.decoder = VisionCost(config), DecoderCost(config)
        self.recipe: CropRecipe = crop_recipe(config, options)
        self.markers = 0 if config.backbone.image_start_token is None else 2

    def plain(self, prompt: Prompt) -> int:
        """FLOPs of the plain VLM, and of a row with zoom="never"."""
        decoder = self.decoder.below(prompt.tokens) + self.decoder.above(prompt.tokens) + self.decoder.head()
        return self.vision(prompt.grid) + decoder

    def skipped(self, prompt: Prompt) -> int:
        """FLOPs of a row whose gate stays closed: the plain prefill and the gate's T layers."""
        return self.plain(prompt) + self.decoder.gate(prompt.tokens)

    def zoomed(self, prompt: Prompt, crop: Grid, gate: bool = True) -> int:
        """FLOPs of a row that zooms: the prefix crosses every layer once, what follows crosses layers [0, K) twice.

        Args:
            prompt: lengths of the row's prompt.
            crop: (height, width) of the crop in merged visual tokens.
            gate: whether the gate branch ran; with zoom="always" it does not.
        """
        inserted = crop[0] * crop[1] + self.markers
        vision = self.vision(prompt.grid) + self.vision(crop)
        first = self.decoder.below(prompt.tokens) + self.decoder.region(prompt.tokens, prompt.visual)
        first += self.decoder.gate(prompt.tokens) if gate else 0
        second = self.decoder.second_pass(inserted + prompt.suffix, inserted + prompt.tokens)
        return vision + first + second + self.decoder.head()

    def of_answer(self, answer: Answer) -> int:
        """FLOPs of the prefill that gave an answer, as its report tells: plain, skipped, zoomed or without a crop."""
        prompt, report = Prompt(answer.prompt_tokens, answer.suffix_tokens, answer.grid), answer.report
        gate = report.gate_probability is not None or report.reason == "gate_nan"
        if report.zoomed:
            return self.zoomed(prompt, self.crop_grid(report), gate)
        cost = self.skipped(prompt) if gate else self.plain(prompt)
        if report.reason in ("empty_map", "map_nan", "crop_failed"):
            cost += self.decoder.region(prompt.tokens, prompt.visual)
        return cost

    def crop_grid(self, report: ZoomReport) -> Grid:
        """(height, width) of the crop that a report's box makes."""
        if report.box is None:
            raise ValueError("a row that was not zoomed has no crop.")
        x0, y0, x1, y1 = report.box
        return self.recipe.tokens(y1 - y0, x1 - x0)
