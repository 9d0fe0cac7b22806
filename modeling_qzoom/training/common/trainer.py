"""`transformers.Trainer` for stages that train a few weights of a large frozen model.

Trained weights are held in float32 while autocast computes in 16 bit; the frozen rest stays as it was loaded. A
checkpoint holds trained weights only. A run goes on from its newest whole checkpoint and ends as if it had never been
stopped: what a step sees depends on nothing but the seed and its number.
"""

import dataclasses
import difflib
import importlib.util
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
from transformers.utils import is_torch_bf16_gpu_available

from ... import QZoomForConditionalGeneration
from ...asking.session import Session
from .config import TrainConfig


logger = logging.getLogger(__name__)

WEIGHTS = "trained.safetensors"

Key = tuple[int, int]
"""What a stage's dataset is asked for: the epoch, for whatever it draws anew in each of them, and the item's index."""
Counts = dict[str, tuple[float, float]]
"""Measures of a batch by name, each as a sum and what it is divided by; they are logged as shares."""

# the paper's optimiser (its table IX); batch sizes and learning rates are a stage's own
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,
}
_FIXED = {
    "output_dir": "the stage's `output` decides",
    "seed": "the stage's `seed` decides",
    "remove_unused_columns": "the stages need every column",
    "torch_compile": "rows of changing length would compile again and again",
}


def _has_accelerator(session: Session) -> bool:
    return session.device.type != "cpu"


def _precision(session: Session) -> dict[str, bool]:
    """Autocast: 16 bit where the backbone is held so, and wherever a GPU is fast in it."""
    # the input embedding is never quantized, so its type is the backbone's
    held = session.model.get_input_embeddings().weight.dtype
    if not _has_accelerator(session):
        return {"bf16": held != torch.float32}
    if is_torch_bf16_gpu_available() and held != torch.float16:
        return {"bf16": True}
    return {"fp16": held == torch.float16}


def training_arguments(config: TrainConfig, session: Session, stage: dict[str, Any]) -> TrainingArguments:
    """Trainer's arguments: the paper's, the stage's over them, and the user's over both.

    Args:
        stage: The stage's own defaults.

    Raises:
        ValueError: `trainer` holds an unknown option, or one that the stage has to set.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in config.trainer:
        if name in _FIXED:
            raise ValueError(f"trainer.{name} cannot be set: {_FIXED[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"trainer.{name} is no option of transformers.TrainingArguments{hint}")
    own = dict(config.trainer)
    if "activation_checkpointing" in known:
        # the name that transformers 5.2x knew it by, which it now warns of
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            if old in own:
                own.setdefault(old.replace("gradient", "activation"), own.pop(old))
    chosen = {
        **_DEFAULTS,
        "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        "dataloader_num_workers": 4 if _has_accelerator(session) else 0,
        **_precision(session),
        **stage,
        **own,
    }
    if chosen.get("bf16") and chosen.get("fp16") and "bf16" in own:
        chosen.pop("fp16")
    arguments = TrainingArguments(
        output_dir=str(Path(config.output) / "trainer"),
        seed=config.seed,
        use_cpu=not _has_accelerator(session),
        remove_unused_columns=False,
        **chosen,
    )
    if arguments.n_gpu > 1:
        # DataParallel would tear lists of maps and images apart
        logger.warning("one process uses one GPU of %d; start one a GPU with accelerate launch", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def hold_trainable(model: nn.Module, parts: Iterable[nn.Module | nn.Parameter]) -> dict[str, torch.dtype]:
    """Freeze a model but for some parts, and hold those in float32.

    Returns:
        The types that the trained weights had, by name.
    """
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    held = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    for name in held:
        weight = model.get_parameter(name)
        weight.data = weight.data.float()
    return held


def load_trained(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put trained weights back into a model whose trainable weights are chosen.

    Raises:
        ValueError: They are those of other parts.
    """
    wanted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if wanted.keys() != weights.keys():
        raise ValueError(
            f"The checkpoint holds other weights than are trained now, such as {min(wanted.keys() ^ weights.keys())}; "
            "delete the output folder to train anew."
        )
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(weights[name])


class EpochOrder(Sampler[Key]):
    """All items of a dataset in an order that depends on seed and epoch only.

    Args:
        size: Items of the dataset.
        seed: Of the order.
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
        model: With its trainable weights chosen (`hold_trainable`).
        args: From `training_arguments`.
        dataset: Map-style; asked for `Key`s.
        collate: From its items to a batch, which is `forward`'s keywords.
        measure: What to log about a batch besides the loss.
    """

    def __init__(
        self,
        model: QZoomForConditionalGeneration,
        args: TrainingArguments,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        measure: Callable[[dict[str, Any]], Counts] | None = None,
    ) -> None:
        self._order = EpochOrder(len(cast(Sized, dataset)), args.seed, args.train_sampling_strategy != "sequential")
        self._measure = measure
        self._seen: dict[str, tuple[float, float]] = {}
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
        if self._measure is not None:
            for name, (value, base) in self._measure(inputs).items():
                seen = self._seen.get(name, (0.0, 0.0))
                self._seen[name] = (seen[0] + value, seen[1] + base)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the measures since the last time."""
        if "loss" in logs:
            logs |= {name: value / base for name, (value, base) in self._seen.items() if base}
            self._seen.clear()
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
