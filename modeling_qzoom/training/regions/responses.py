"""What the model answers to prompts, as the tokens whose attention is read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import QZoomForConditionalGeneration


@dataclass(frozen=True)
class Response:
    """What the model answered to one prompt.

    Attributes:
        ids: (n,) generated tokens up to the end-of-sequence token, which is not among them.
        ended: whether it ended by itself; otherwise the longest allowed answer was reached.
    """

    ids: Tensor
    ended: bool


@torch.no_grad()
def respond(model: QZoomForConditionalGeneration, inputs: dict[str, Any], max_new_tokens: int) -> list[Response]:
    """Greedy responses of the plain VLM, without zooming.

    Args:
        inputs: a batch of the processor, padded on the left, on the model's device.
        max_new_tokens: longest response, in tokens.
    """
    visual = [model.config.image_token_id, model.config.video_token_id]
    output = model.generate(
        **inputs,
        zoom="never",
        do_sample=False,
        max_new_tokens=max_new_tokens,
        # the pass over the response would look for an image behind such a token
        suppress_tokens=[token for token in visual if token is not None],
    )
    new = output[:, inputs["input_ids"].shape[1] :]  # (B, n)
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    ends = torch.isin(new, torch.tensor(stops, device=new.device, dtype=new.dtype))
    lengths = torch.where(ends.any(1), ends.int().argmax(1), new.shape[1]).tolist()
    return [
        Response(ids[:length], ended) for ids, length, ended in zip(new, lengths, ends.any(1).tolist(), strict=True)
    ]
