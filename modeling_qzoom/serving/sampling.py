"""How the words of each row of a batch are chosen: rows with different temperatures and seeds share one pass."""

import secrets
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .events import Sampling


@dataclass(frozen=True)
class Draw:
    """How one answer's words are drawn; with a temperature of 0 the most probable one is taken."""

    temperature: float
    top_p: float
    top_k: int
    seed: int


def draws_of(sampling: Sampling, defaults: GenerationConfig, choices: int) -> list[Draw]:
    """How each choice of a request is drawn.

    A request that says nothing gets what the checkpoint's generation config says: greedy answers unless `do_sample`
    is set there. One that gives `top_p` alone draws at a temperature of 1.

    Args:
        sampling: what the request says.
        defaults: the checkpoint's generation config.
        choices: number of answers.
    """
    draws = bool(defaults.do_sample)
    temperature = sampling.temperature
    if temperature is None:
        own = (defaults.temperature if defaults.temperature is not None else 1.0) if draws else 0.0
        temperature = 1.0 if sampling.top_p is not None and not draws else own
    top_p = sampling.top_p if sampling.top_p is not None else (defaults.top_p if draws else None)
    top_k = (defaults.top_k or 0) if draws else 0
    seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
    return [Draw(temperature, 1.0 if top_p is None else top_p, top_k, seed + index) for index in range(choices)]


def _warpers(draw: Draw) -> LogitsProcessorList:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(draw.temperature)])
    if draw.top_k:
        warpers.append(TopKLogitsWarper(draw.top_k))
    if draw.top_p < 1.0:
        warpers.append(TopPLogitsWarper(draw.top_p))
    return warpers


class RowSampler(LogitsProcessor):
    """Chooses every row's next word by its own rule and leaves `generate` no other.

    A row draws with a generator of its own, so its words depend on its seed and on nothing else in the batch.

    Args:
        draws: one rule for each row.
        device: where the scores will be.
    """

    def __init__(self, draws: list[Draw], device: torch.device) -> None:
        self._rows = [
            (index, _warpers(draw), torch.Generator(device).manual_seed(draw.seed % 2**63))
            for index, draw in enumerate(draws)
            if draw.temperature > 0
        ]

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """(B, V) scores in which one word of each row has any chance."""
        chosen = scores.argmax(-1, keepdim=True)  # (B, 1)
        for index, warpers, generator in self._rows:
            row = slice(index, index + 1)
            probabilities = warpers(input_ids[row], scores[row].float()).softmax(-1)
            chosen[row] = torch.multinomial(probabilities, 1, generator=generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
