"""A training run in its output folder: begun once, resumed as often as needed, finished once."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import set_seed

from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session, save_session
from ...data.files import damage_of, read_json, write_json
from ...loading_addons_qzoom import has_unmerged_lora
from ...saving_qzoom import ADDON, FULL, check_target
from .config import TrainConfig
from .trainer import WEIGHTS, Counts, StageTrainer, hold_trainable, load_trained, training_arguments


logger = logging.getLogger(__name__)

RECORD = "run.json"
# what a run may be resumed with another value of, because it trains the same
_FREE = (
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
)

Parts = Iterable[nn.Module | nn.Parameter]


def work_folder(config: TrainConfig) -> Path:
    """Where Trainer keeps its checkpoints and logs."""
    return Path(config.output) / "trainer"


def _options(config: TrainConfig) -> dict[str, Any]:
    """What decides the result, as JSON has it."""
    values = dataclasses.asdict(config)
    values["trainer"] = {name: value for name, value in values["trainer"].items() if name not in _FREE}
    return json.loads(json.dumps(values))


def _read_record(config: TrainConfig, stage: str) -> dict[str, Any] | None:
    """The run that the output folder holds.

    Raises:
        ValueError: It is a run of another stage or with other options.
    """
    path = work_folder(config) / RECORD
    if not path.exists():
        return None
    way_out = f"delete {config.output} to train anew"
    record = read_json(path, way_out, ("stage", "options", "backbone", "finished"))
    if not isinstance(record["options"], dict):
        raise ValueError(f"{path} is no record of a run; {way_out}.")
    wanted, held = _options(config), record["options"]
    differing = [name for name in sorted({*wanted, *held}) if wanted.get(name) != held.get(name)]
    differing = ["stage"] if record["stage"] != stage else differing
    if differing:
        raise ValueError(
            f"output={config.output} holds a run whose {', '.join(differing)} differ from what is asked for now; give "
            "another output folder, or delete this one to train anew."
        )
    return record


def _write_record(config: TrainConfig, record: dict[str, Any]) -> None:
    path = work_folder(config) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def is_finished(config: TrainConfig, stage: str) -> bool:
    """Whether the output folder holds the finished checkpoint of exactly this run; says so.

    Raises:
        ValueError: It holds another run or another model, or 4-bit weights are to be saved in full.
    """
    if config.load_in_4bit and config.output_format != "addon":
        raise ValueError("A 4-bit backbone is not written out: set output_format=addon.")
    record = _read_record(config, stage)
    if record is None or not record["finished"]:
        check_target(config.output, ADDON if config.output_format == "addon" else FULL)  # not hours later
        return False
    logger.info("%s is finished; delete the folder to train it again", config.output)
    return True


def _damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing or cut short; None for a whole one. Trainer writes its state last."""
    needed = [checkpoint / "trainer_state.json", checkpoint / WEIGHTS]
    return next(filter(None, map(damage_of, [*needed, *sorted(checkpoint.iterdir())])), None)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The latest checkpoint that is whole; newer ones that are not are named in a warning."""
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    for _, path in sorted(numbered, reverse=True):
        damage = _damage(path)
        if damage is None:
            return path
        logger.warning("%s is passed over for an older checkpoint: %s", path.name, damage)
    return None


def _begin(config: TrainConfig, stage: str, backbone: str) -> None:
    """Notes a new run, or checks that the one under way is on the same backbone."""
    record = _read_record(config, stage)
    if record is None:
        record = {"stage": stage, "options": _options(config), "backbone": backbone, "finished": False}
        if PartialState().is_main_process:
            _write_record(config, record)
    elif record["backbone"] != backbone:
        raise ValueError(
            f"output={config.output} holds a run that was begun on other weights of model={config.model}; delete the "
            "folder to train anew."
        )


def train(
    stage: str,
    session: Session,
    config: TrainConfig,
    prepare: Callable[[Session], Parts],
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    defaults: dict[str, Any] | None = None,
    measure: Callable[[dict[str, Any]], Counts] | None = None,
    finish: Callable[[Session], None] | None = None,
) -> None:
    """Train parts of a model and write the finished checkpoint to `config.output`.

    Args:
        stage: Its name.
        session: The model as loaded; it holds the trained weights afterwards, unless they were sharded.
        prepare: Readies the model (fresh branches, adapters) and returns what is to be trained. It must do the same
            on a model that is loaded again.
        dataset, collate, measure: As for `StageTrainer`.
        defaults: The stage's own defaults of `TrainingArguments`.
        finish: What happens to the model between the last step and saving, such as merging adapters.

    Raises:
        ValueError: The output folder holds another run, or an option of `trainer` does not fit.
    """
    if config.output_format == "full" and has_unmerged_lora(session.model):
        raise ValueError(
            f"model={config.model} carries an unmerged LoRA adapter, for which a full checkpoint has no place: set "
            "output_format=addon, or merge it first (model.merge_lora() and save_pretrained)."
        )
    arguments = training_arguments(config, session, defaults or {})
    backbone = backbone_fingerprint(session.model)
    set_seed(config.seed)
    parts = list(prepare(session))  # what it refuses leaves no trace in the output folder
    with PartialState().main_process_first():
        _begin(config, stage, backbone)
    types = hold_trainable(session.model, parts)
    had_cache = getattr(session.model.config, "use_cache", None)
    trainer = StageTrainer(session.model, arguments, dataset, collate, measure)
    resumed = newest_checkpoint(work_folder(config))
    if resumed is not None:
        logger.info("goes on from %s", resumed)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))

    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.trained_weights() if sharded else None
    if PartialState().is_main_process:
        if weights is not None:
            session = _with_weights(config, prepare, weights)
        else:
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            if had_cache is None:
                session.model.config.__dict__.pop("use_cache", None)
            else:
                session.model.config.use_cache = had_cache
        _restore(session.model, types)
        if finish is not None:
            finish(session)
        save_session(session, config.output, config.output_format)
        _write_record(config, {**(_read_record(config, stage) or {}), "finished": True})
    PartialState().wait_for_everyone()


def _with_weights(config: TrainConfig, prepare: Callable[[Session], Parts], weights: dict[str, Tensor]) -> Session:
    """The model loaded again in one piece, with the trained weights."""
    session = open_session(config, device="cpu")
    hold_trainable(session.model, list(prepare(session)))
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
