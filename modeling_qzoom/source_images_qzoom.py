"""The list of source images that the processor returns, and the forms in which it may come back."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


# one source: a PIL image, or integers (3, H, W), also as nested lists
SourceImage = Image.Image | Tensor | np.ndarray | list[Any]
# the sources of a batch: one, a flat list or stack, or one list (or None) per row
SourceInput = SourceImage | Sequence[SourceImage | Sequence[SourceImage] | None]


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The device among the arguments of a tensor's `to`; None where there is only a dtype."""
    if kwargs.get("device") is not None:
        return kwargs["device"]
    target = args[0] if args else kwargs.get("other")
    if isinstance(target, Tensor):
        return target.device
    return None if isinstance(target, torch.dtype) else target


class SourceImages(list[Any]):
    """A list of source images that moves between devices as a tensor does.

    The usual line `{name: value.to(device) for name, value in inputs.items()}` works on it. Sources stay as they are
    otherwise: whole, uint8, each of its own size. A dtype given to `to` is for the floating-point tensors beside them.
    """

    def to(self, *args: Any, **kwargs: Any) -> "SourceImages":
        """The images on another device; takes what `torch.Tensor.to` takes."""
        device = _device_of(args, kwargs)
        if device is None:
            return self
        options = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        return self._moved("to", device, **options)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> "SourceImages":
        """The images on a CUDA device, the current one by default."""
        return self._moved("cuda", device, non_blocking=non_blocking)

    def cpu(self) -> "SourceImages":
        """The images in main memory."""
        return self._moved("cpu")

    def pin_memory(self) -> "SourceImages":
        """The images in page-locked memory, from where copies to a GPU are fast."""
        return self._moved("pin_memory")

    def _moved(self, method: str, *args: Any, **kwargs: Any) -> "SourceImages":
        def move(item: Any) -> Any:
            if isinstance(item, Tensor):
                return getattr(item, method)(*args, **kwargs)
            return type(item)(move(member) for member in item) if isinstance(item, (list, tuple)) else item

        return SourceImages(move(item) for item in self)

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        return SourceImages(item) if isinstance(index, slice) else item

    def __add__(self, other: Iterable[Any]) -> "SourceImages":
        return SourceImages([*self, *other])

    def copy(self) -> "SourceImages":
        """A new list of the same images."""
        return SourceImages(self)


def _depth(nested: Any) -> int | None:
    """How many lists lie around the first number; None where the innermost thing is no number."""
    depth = 0
    while isinstance(nested, (list, tuple)) and len(nested):
        nested, depth = nested[0], depth + 1
    return depth if isinstance(nested, (int, float)) else None


def unpack_images(images: Any) -> Any:
    """Source images as lists of arrays, tensors or PIL images, whichever form a data set stored them in.

    Args:
        images: one image or nested lists of images. A stack (a tensor or array of four dimensions or more) counts as a
            list, an array of objects as well, and three lists around numbers as one image (3, H, W).
    """
    if isinstance(images, np.ndarray) and images.dtype == object:
        images = list(images)
    if isinstance(images, (np.ndarray, Tensor)):
        return [unpack_images(image) for image in images] if images.ndim > 3 else images
    if not isinstance(images, (list, tuple)):
        return images
    if _depth(images) == 3:
        try:
            return np.array(images)
        except ValueError:  # rows of unequal length; whoever knows the image's place refuses the list
            return images
    return [unpack_images(image) for image in images]


def as_uint8(image: Any) -> Tensor | None:
    """Integers in 0..255 of any kind and of shape (3, H, W) as a uint8 tensor; None for anything else."""
    if isinstance(image, np.ndarray) and image.dtype.kind in "iu":
        image = torch.from_numpy(image.astype(np.int64) if image.dtype != np.uint8 else np.ascontiguousarray(image))
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        return None
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool or image.is_floating_point() or image.is_complex():
        return None
    image = image.to(torch.int64)  # narrow unsigned kinds know no minimum
    return image.to(torch.uint8) if image.min() >= 0 and image.max() <= 255 else None
