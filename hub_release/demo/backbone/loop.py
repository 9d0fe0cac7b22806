"""A small explicit training loop: warm-up, plateau, linear decay, resumable checkpoints."""

import logging
import os
import time
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from modeling_qzoom.data.files import written_whole


logger = logging.getLogger(__name__)

Step = Callable[[Any], tuple[Tensor, dict[str, float]]]


def save_state(module: nn.Module, path: Path, step: int = 0) -> None:
    """Writes a module's weights and the step that they belong to; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # clones, because tied weights share memory, which the format refuses
    weights = {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}
    with written_whole(path) as partial:
        save_file(weights, partial, metadata={"step": str(step)})


def load_state(module: nn.Module, path: Path) -> None:
    """Reads weights that `save_state` wrote."""
    module.load_state_dict(load_file(path))


def load_step(path: Path) -> int:
    """The step that a file of `save_state` belongs to."""
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def rate(done: float, step: int, warm: int, decay: float) -> float:
    """Share of the peak rate at `step`, `done` of the way: warm-up, plateau, linear decay over the last `decay`."""
    tail = 1.0 if decay == 0 else min(1.0, (1.0 - done) / decay)
    return min(1.0, (step + 1) / warm) * max(0.03, tail)


def _set_rates(optimizers: list[torch.optim.Optimizer], peaks: list[list[float]], share: float) -> None:
    """Sets every rate to a share of its peak."""
    for optimizer, values in zip(optimizers, peaks, strict=True):
        for group, value in zip(optimizer.param_groups, values, strict=True):
            group["lr"] = value * share


class _RunningMeans:
    """Measures of the last steps, averaged."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, measures: dict[str, float]) -> None:
        """Takes the measures of a step; one without a case in it is not a number, and changes nothing."""
        for name, value in measures.items():
            if value == value:
                self.values[name] = 0.95 * self.values.get(name, value) + 0.05 * value

    def __str__(self) -> str:
        return " ".join(f"{name} {value:.3f}" for name, value in sorted(self.values.items()))


def fit(
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    steps: Dataset,
    step_loss: Step,
    path: Path,
    decay: float = 0.5,
    warm: int = 50,
) -> None:
    """Trains a module and leaves its weights at `path`; an interrupted run resumes at its last saved step.

    Args:
        optimizers: their rates at the start are the peak rates.
        steps: the data of every step by its number, so that a resumed run sees what it would have seen.
        step_loss: turns a step's data into a loss and measures in [0, 1], which are logged as running means.
        decay: share of the steps over which the rate falls to nearly nothing; 0 keeps it.
    """
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    means = _RunningMeans()
    began = time.monotonic()
    running = path.with_name(path.stem + "-running.safetensors")
    first = 0
    if running.exists():
        load_state(module, running)
        first = load_step(running)
        logger.info("%s resumes at step %d", path.stem, first)
    count = len(cast(Sized, steps))
    # drawing pages takes long; other processes do it meanwhile, each a step of its own
    workers = max(1, (os.cpu_count() or 1) - 1)
    loader = DataLoader(steps, batch_size=None, sampler=range(first, count), num_workers=workers, prefetch_factor=4)
    for step, data in enumerate(loader, start=first):
        # the optimisers start anew after an interruption, so they warm up again
        _set_rates(optimizers, peaks, rate(step / count, step - first, warm, decay))
        loss, measures = step_loss(data)
        measures["loss"] = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        means.add(measures)
        if step % 20 == 19:
            logger.info("%s step %d/%d %.0fs %s", path.stem, step + 1, count, time.monotonic() - began, means)
        if step % 100 == 99:
            save_state(module, running, step + 1)
    save_state(module, path, count)
    running.unlink(missing_ok=True)
