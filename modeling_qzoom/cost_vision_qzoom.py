"""FLOPs of vision towers and projectors in closed form; grids are (height, width) in merged visual tokens."""

from .backbone_grids_qzoom import Size
from .backbones_qzoom import token_grid_of
from .configuration_qzoom import QZoomConfig
from .cost_decoder_qzoom import layer_flops


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

    def __call__(self, grid: Size) -> int:
        """FLOPs of one image of this grid."""
        patches = grid[0] * grid[1] * self.geometry.merge**2
        embedding = 2 * patches * self.pixels * self.width
        if self.pooled:
            return embedding + self._clip(patches)
        matrices = 3 if self.windowed else 2  # the MLP of the windowed tower is gated
        mlp = matrices * 2 * self.width * self.vision.intermediate_size
        linear = self.vision.depth * layer_flops(patches, 0, self.width, self.width, self.width, mlp)
        attention = sum(4 * self.width * self._pairs(grid, block) for block in range(self.vision.depth))
        mergers = 1 + len(getattr(self.vision, "deepstack_visual_indexes", None) or ())
        merged = self.width * self.geometry.merge**2
        merger = 2 * grid[0] * grid[1] * merged * (merged + self.output)
        return embedding + linear + attention + mergers * merger

    def _pairs(self, grid: Size, block: int) -> int:
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
        layer = layer_flops(tokens, tokens, self.width, self.width, self.width, mlp)
        layers = self.vlm.vision_feature_layer
        features = self.width * (1 if isinstance(layers, int) else len(layers))
        return self.vision.num_hidden_layers * layer + 2 * patches * self.output * (features + self.output)
