"""`transformers.Trainer` for stages that train a few weights of a large frozen model.

Trained weights are held in float32 while autocast computes in 16 bit; the frozen rest stays as it was loaded. A
checkpoint holds trained weights only. A run goes on from its newest whole checkpoint and ends as if it had never been
stopped: what a step sees depends on nothing but the seed and its number.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ... import QZoomForConditionalGeneration


logger = logging.getLogger(__name__)

WEIGHTS = "trained.safetensors"

# what a stage's dataset is asked for: the epoch, for whatever it draws anew in each of them, and the item's index
Key = tuple[int, int]
# measures of a batch by name, each as a sum and what it is divided by; they are logged as shares
Counts = dict[str, tuple[float, float]]


def hold_trainable(model: nn.Module, parts: Iterable[nn.Module | nn.Parameter]) -> dict[str, torch.dtype]:
    """Freeze a model but for some parts, and hold those in float32.

    Returns:
        The types that the trained weights had, by name.
    """
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    types = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    for name in types:
        weight = model.get_parameter(name)
        weight.data = weight.data.float()
    return types


def load_trained(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put trained weights back into a model that `hold_trainable` has readied.

    Raises:
        ValueError: they are those of other parts.
    """
    targets = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if targets.keys() != weights.keys():
        raise ValueError(
            "The checkpoint holds other weights than are trained now, such as "
            f"{min(targets.keys() ^ weights.keys())}; delete the output folder to train anew."
        )
    with torch.no_grad():
        for name, weight in targets.items():
            weight.copy_(weights[name])


class EpochOrder(Sampler[Key]):
    """All items of a dataset in an order that depends on seed and epoch only.

    Args:
        size: number of items of the dataset.
        seed: seed of the order.
        shuffled: False keeps the items in order.
    """

    def __init__(self, size: int, seed: int, shuffled: bool = True) -> None:
        self.size, self.seed, self.shuffled, self.epoch = size, seed, shuffled, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration belongs to."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist() if self.shuffled else range(self.size)
        return iter([(self.epoch, index) for index in order])


class _Epochs(TrainerCallback):
    """Tells the order its epoch; accelerate does so only where no batches are skipped."""

    def __init__(self, order: EpochOrder) -> None:
        self.order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.order.set_epoch(int((state.epoch or 0) + 1e-6))


class StageTrainer(Trainer):
    """A `Trainer` that checkpoints trained weights only.

    Args:
        model: a model that `hold_trainable` has readied.
        args: from `training_arguments`.
        dataset: map-style; asked for `Key`s.
        collate: makes of its items a batch, which is `forward`'s keywords.
        measure: what to log about a batch besides the loss.
        at_step: keywords of `forward` at an optimiser's step, beside the batch's.
    """

    def __init__(
        self,
        model: QZoomForConditionalGeneration,
        args: TrainingArguments,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        measure: Callable[[dict[str, Any]], Counts],
        at_step: Callable[[int], dict[str, Any]] = lambda step: {},
    ) -> None:
        self._order = EpochOrder(len(cast(Sized, dataset)), args.seed, args.train_sampling_strategy != "sequential")
        self._measure, self._at_step = measure, at_step
        self._totals: dict[str, tuple[float, float]] = {}
        self._frozen = [
            part for part in model.modules() if not any(weight.requires_grad for weight in part.parameters())
        ]
        quantized = getattr(model, "is_quantized", False)
        # Trainer accepts a quantized model with LoRA only; here, too, nothing of it that is quantized is trained
        model.is_quantized = False
        try:
            super().__init__(
                model, args, data_collator=collate, train_dataset=dataset, callbacks=[_Epochs(self._order)]
            )
        finally:
            model.is_quantized = quantized
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Key]:
        return self._order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; parts without a trained weight run as at inference."""
        for part in self._frozen:
            part.training = False
        inputs = {**inputs, **self._at_step(self.state.global_step)}
        for name, (value, base) in self._measure(inputs).items():
            total, bases = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (total + value, bases + base)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the measures since the last time."""
        if "loss" in logs:
            logs |= {name: value / base for name, (value, base) in self._totals.items() if base}
            self._totals.clear()
        if self.args.disable_tqdm and self.is_world_process_zero():
            logger.info("step %d %s", self.state.global_step, {name: float(f"{logs[name]:.4g}") for name in logs})
        super().log(logs, start_time)

    def trained_weights(self) -> dict[str, Tensor]:
        """The trained weights by name, on the CPU; gathered where they are sharded, which every process joins."""
        if self.is_deepspeed_enabled:
            whole = self.accelerator.get_state_dict(self.deepspeed)
            trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
            return {name: value.cpu() for name, value in whole.items() if name in trained}
        if self.is_fsdp_enabled:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            return cast(dict[str, Tensor], get_model_state_dict(self.model, options=options))
        return {
            name: weight.detach().cpu().clone()
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights into a checkpoint."""
        folder = Path(output_dir or self.args.output_dir)
        weights = self.trained_weights()
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{WEIGHTS}.partial"
            save_file(weights, partial)
            partial.replace(folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer's own way writes the whole model beside the optimiser
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        target = cast(nn.Module, self.model if model is None else model)
        if self.is_fsdp_enabled:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(target, cast(dict[str, Any], weights), options=options)
            return
        load_trained(target, weights)
