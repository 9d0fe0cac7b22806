"""Tables of attention heads, by decoder layer."""

from ... import QZoomForConditionalGeneration
from .config import Heads


def all_heads(model: QZoomForConditionalGeneration) -> Heads:
    """Every head of every decoder layer below the last."""
    config = model.config.get_text_config()
    return {layer: list(range(config.num_attention_heads)) for layer in range(config.num_hidden_layers - 1)}


def count_heads(heads: Heads) -> int:
    """Number of heads in a table."""
    return sum(len(indices) for indices in heads.values())


def check_heads(model: QZoomForConditionalGeneration, heads: Heads) -> None:
    """Check that a model has the heads of a table.

    Raises:
        ValueError: the model has no such layer or head.
    """
    config = model.config.get_text_config()
    layers, count = config.num_hidden_layers, config.num_attention_heads
    for layer, indices in heads.items():
        if not 0 <= layer < layers:
            raise ValueError(f"The heads name layer {layer}; the model has layers 0 to {layers - 1}.")
        wrong = [head for head in indices if not 0 <= head < count]
        if wrong:
            raise ValueError(f"The heads name {wrong} in layer {layer}; the model has heads 0 to {count - 1}.")


def merge_heads(first: Heads, second: Heads) -> Heads:
    """A table with the heads of both."""
    return {
        layer: list(dict.fromkeys([*first.get(layer, []), *second.get(layer, [])]))
        for layer in sorted({*first, *second})
    }
