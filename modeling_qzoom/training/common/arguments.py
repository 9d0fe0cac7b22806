"""Trainer's arguments: the paper's, a stage's over them, and the user's over both."""

import dataclasses
import difflib
import importlib.util
import logging
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ...asking.session import Session
from .config import RunConfig
from .run_folder import work_folder


logger = logging.getLogger(__name__)

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
    """Autocast: 16 bit where the backbone is in 16 bit, and wherever a GPU is fast in it."""
    # the input embedding is never quantized, so its type is the backbone's
    dtype = session.model.get_input_embeddings().weight.dtype
    if not _has_accelerator(session):
        return {"bf16": dtype != torch.float32}
    if is_torch_bf16_gpu_available() and dtype != torch.float16:
        return {"bf16": True}
    return {"fp16": dtype == torch.float16}


def training_arguments(config: RunConfig, session: Session, stage: dict[str, Any]) -> TrainingArguments:
    """Trainer's arguments: the paper's, the stage's over them, and the user's over both.

    Args:
        config: options of the stage.
        session: the model.
        stage: the stage's own defaults.

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
    user = dict(config.trainer)
    if "activation_checkpointing" in known:
        # the name that transformers 5.2x knew it by, which it now warns of
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            if old in user:
                user.setdefault(old.replace("gradient", "activation"), user.pop(old))
    values = {
        **_DEFAULTS,
        "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        "dataloader_num_workers": 4 if _has_accelerator(session) else 0,
        **_precision(session),
        **stage,
        **user,
    }
    if values.get("bf16") and values.get("fp16") and "bf16" in user:
        values.pop("fp16")
    arguments = TrainingArguments(
        output_dir=str(work_folder(config)),
        seed=config.seed,
        use_cpu=not _has_accelerator(session),
        remove_unused_columns=False,
        **values,
    )
    if arguments.n_gpu > 1:
        # DataParallel would tear lists of maps and images apart
        logger.warning("one process uses one GPU of %d; start one a GPU with accelerate launch", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments
