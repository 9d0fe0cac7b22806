"""FLOPs that a call really does, at real shapes, without weights and without doing them.

A hollow model has weights that take no memory, and while FLOPs are counted large tensors are zeros that take none
either. `generate` runs with all its decisions, so what is counted is the code path itself. Values mean nothing: logits
are zero, every gate says one half, and heat maps are flat.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from .. import QZoomConfig, QZoomForConditionalGeneration


# largest tensor that is computed with
_SMALL = 2**18
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The CPU's attention kernel, which torch leaves uncounted; a causal mask counts full."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


class _NoNumbers(TorchDispatchMode):
    """Operations on large floating-point tensors give zeros of the right shape, which take no memory.

    Small ones are done: with them a call decides what it does next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[Any, Any] = {}  # layers repeat each other, and asking for a shape is slow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        returned = func._schema.returns
        is_view = any(entry.alias_info is not None and not entry.alias_info.is_write for entry in returned)
        if is_view or not any(isinstance(leaf, Tensor) and _is_large(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return args[0]
        key = (func, *(_described(leaf) for leaf in leaves))
        if key not in self.shapes:
            self.shapes[key] = _shapes(func, args, kwargs)
        shapes = self.shapes[key]
        return func(*args, **kwargs) if shapes is None else tree_map(_zeros, shapes)


def _described(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns, on the meta device; None where it must be done."""
    try:
        shapes = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
    except (NotImplementedError, RuntimeError):  # the shape depends on values, as that of a masked selection does
        return None
    is_number = all(part.is_floating_point() for part in tree_leaves(shapes) if isinstance(part, Tensor))
    return shapes if is_number else None  # else a check or a choice


def _is_large(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > _SMALL


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros(value: Any) -> Any:
    return torch.zeros((), dtype=value.dtype).expand(value.shape) if isinstance(value, Tensor) else value


def hollow_model(config: QZoomConfig) -> QZoomForConditionalGeneration:
    """A model whose weights are all zero and take no memory."""
    with torch.device("meta"):
        model = QZoomForConditionalGeneration(config).eval()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@torch.no_grad()
def counted_flops(function: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of what a call does on a hollow model, and what it returns.

    Matrix products, convolutions and attention count, as in `cost_decoder_qzoom`.
    """
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
    with _NoNumbers(), counter:
        result = function()
    return counter.get_total_flops(), result
