"""Fingerprints of weights, which tell labels of one model from those of another."""

import hashlib

import torch

from .. import QZoomForConditionalGeneration


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SAMPLED = 16


def backbone_fingerprint(model: QZoomForConditionalGeneration) -> str:
    """Names the VLM's architecture and weights, so that labels made by another one are noticed.

    A few values of every tensor are enough to tell two trainings apart. They are compared in bfloat16, so a checkpoint
    is the same in float32 and in 16 bit; in 4 bit it is another one.
    """
    config = model.config
    sizes = [config.vlm_config.model_type] + [getattr(config.get_text_config(), name, None) for name in _SIZES]
    return _fingerprint(model.vlm, repr(sizes))


def region_fingerprint(model: QZoomForConditionalGeneration) -> str:
    """Names the weights of the region branch, which decides where a zoomed answer looks."""
    return _fingerprint(model.zoom.region, "region")


def _fingerprint(module: torch.nn.Module, beginning: str) -> str:
    digest = hashlib.sha256(beginning.encode())
    for name, weight in sorted(module.named_parameters()):
        values = weight.detach().flatten()[:_SAMPLED].cpu()
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()
