"""Trains a stage: from its labels or rows to a finished checkpoint."""

import functools
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import set_seed

from ...asking.session import Session, open_session, save_session
from ...loading_lora_qzoom import has_unmerged_lora
from .arguments import training_arguments
from .run_folder import RunFolder
from .stage import TrainStage
from .trainer import StageTrainer, hold_trainable, load_trained


def train(stage: TrainStage[Any, Any]) -> None:
    """Train parts of a model on what the stage opens, and write the finished checkpoint to the stage's `output`.

    A run that was stopped goes on from its newest checkpoint; one that is finished is left as it is.

    Args:
        stage: what is trained on what, and its options.

    Raises:
        ValueError: labels, data, model or an option do not fit, or the output folder holds another run.
    """
    config = stage.config
    folder = RunFolder(config, stage.name)
    if folder.is_finished():
        return
    stage.check()
    material = stage.open()
    session, dataset = material.session, stage.dataset(material)
    if config.output_format == "full" and has_unmerged_lora(session.model):
        raise ValueError(
            f"model={config.model} carries an unmerged LoRA adapter, for which a full checkpoint has no place: set "
            "output_format=addon, or merge it first (model.merge_lora() and save_pretrained)."
        )
    arguments = training_arguments(config, session, stage.defaults())
    set_seed(config.seed)
    parts = list(stage.parts(session))  # what it refuses leaves no trace in the output folder
    with PartialState().main_process_first():
        folder.begin(material.backbone)
    types = hold_trainable(session.model, parts)
    had_cache = getattr(session.model.config, "use_cache", None)
    collate = functools.partial(stage.collate, pad_token_id=session.processor.tokenizer.pad_token_id)
    at_step = functools.partial(stage.at_step, session)
    trainer = StageTrainer(session.model, arguments, dataset, collate, stage.measure, at_step)
    trainer.train(resume_from_checkpoint=folder.resume_from())

    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.trained_weights() if sharded else None
    if PartialState().is_main_process:
        if weights is not None:
            session = _with_weights(stage, weights)
        else:
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            if had_cache is None:
                session.model.config.__dict__.pop("use_cache", None)
            else:
                session.model.config.use_cache = had_cache
        _restore(session.model, types)
        stage.finish(session)
        save_session(session, config.output, config.output_format)
        folder.finish()
    PartialState().wait_for_everyone()


def _with_weights(stage: TrainStage[Any, Any], weights: dict[str, Tensor]) -> Session:
    """The model loaded again in one piece, with the trained weights."""
    session = open_session(stage.config, device="cpu")
    hold_trainable(session.model, list(stage.parts(session)))
    load_trained(session.model, weights)
    return session


def _restore(model: nn.Module, types: dict[str, torch.dtype]) -> None:
    """Evaluation mode, and trained weights in the types that they were loaded in."""
    for name, dtype in types.items():
        weight = model.get_parameter(name)
        weight.data = weight.data.to(dtype)
        weight.grad = None
    model.requires_grad_(False)
    model.eval()
