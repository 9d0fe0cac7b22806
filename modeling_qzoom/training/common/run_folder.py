"""The output folder of a training run: begun once, resumed as often as needed, finished once."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ...data.files import damage_of, read_json, write_json
from ...saving_qzoom import ADDON, FULL, check_target
from .config import RunConfig
from .trainer import WEIGHTS


logger = logging.getLogger(__name__)

RECORD = "run.json"
# arguments that may change between a stop and going on, because they do not change what is learned
_FREE = (
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
)


def work_folder(config: RunConfig) -> Path:
    """Where Trainer keeps its checkpoints and logs."""
    return Path(config.output) / "trainer"


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


class RunFolder:
    """The folder that a run's options name, and the record of the run in it.

    Args:
        config: options of the run.
        stage: name of the stage.
    """

    def __init__(self, config: RunConfig, stage: str) -> None:
        self.config, self.stage, self.path = config, stage, work_folder(config) / RECORD

    def _options(self) -> dict[str, Any]:
        """What decides the result, as JSON has it."""
        values = dataclasses.asdict(self.config)
        values["trainer"] = {name: value for name, value in values["trainer"].items() if name not in _FREE}
        return json.loads(json.dumps(values))

    def _read(self) -> dict[str, Any] | None:
        """The run that the folder holds.

        Raises:
            ValueError: it is a run of another stage or with other options.
        """
        if not self.path.exists():
            return None
        way_out = f"delete {self.config.output} to train anew"
        record = read_json(self.path, way_out, ("stage", "options", "backbone", "finished"))
        if not isinstance(record["options"], dict):
            raise ValueError(f"{self.path} is no record of a run; {way_out}.")
        now, before = self._options(), record["options"]
        differing = [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
        differing = ["stage"] if record["stage"] != self.stage else differing
        if differing:
            raise ValueError(
                f"output={self.config.output} holds a run whose {', '.join(differing)} differ from what is asked for "
                "now; give another output folder, or delete this one to train anew."
            )
        return record

    def _write(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, record)

    def is_finished(self) -> bool:
        """Whether the folder holds the finished checkpoint of exactly this run; says so.

        Raises:
            ValueError: it holds another run or another model.
        """
        record = self._read()
        if record is None or not record["finished"]:
            check_target(
                self.config.output, ADDON if self.config.output_format == "addon" else FULL
            )  # not hours later
            return False
        logger.info("%s is finished; delete the folder to train it again", self.config.output)
        return True

    def begin(self, backbone: str) -> None:
        """Note a new run, or check that the one under way is on the same backbone.

        Args:
            backbone: fingerprint of the model's backbone.

        Raises:
            ValueError: the folder holds another run.
        """
        record = self._read()
        if record is None:
            if PartialState().is_main_process:
                options = self._options()
                self._write({"stage": self.stage, "options": options, "backbone": backbone, "finished": False})
        elif record["backbone"] != backbone:
            raise ValueError(
                f"output={self.config.output} holds a run that was begun on other weights of "
                f"model={self.config.model}; delete the folder to train anew."
            )

    def resume_from(self) -> str | None:
        """The checkpoint that the run goes on from; says so."""
        checkpoint = newest_checkpoint(self.path.parent)
        if checkpoint is None:
            return None
        logger.info("goes on from %s", checkpoint)
        return str(checkpoint)

    def finish(self) -> None:
        """Note that the checkpoint is written."""
        self._write({**(self._read() or {}), "finished": True})
