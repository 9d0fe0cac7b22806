"""`label-gates`, the data of stage 3: the model's answers on a ladder of resolutions (paper III-B1).

Which rows teach the gate what is decided when the labels are loaded (`rule`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ...asking.answers import ask_batch
from ...asking.budgets import at_budget
from ...asking.fingerprints import backbone_fingerprint
from ...asking.judges import Judge, judge_for
from ...asking.session import Session, open_session
from ...data.readers import load_rows
from ...data.rows import Row
from ..common.label_store import Manifest, data_settings, make_labels
from ..common.labelling import Labeler
from ..common.verdicts import verdicts
from .config import LabelGatesConfig
from .record import GateRecord


STAGE = "label-gates"


class GateLabeler(Labeler[tuple[Row, Image.Image], GateRecord]):
    """Labels the rows of a shard with replies on the ladder.

    Args:
        session: the model.
        config: options of the stage.
        judge: who compares replies with each other and with the annotation.
    """

    def __init__(self, session: Session, config: LabelGatesConfig, judge: Judge) -> None:
        super().__init__(session, config.batch_size)
        self.config, self.judge = config, judge

    def load(self, row: Row) -> tuple[Row, Image.Image]:
        """The row and its image."""
        return row, self.image_of(row)

    def climb(self, rows: Sequence[Row], images: Sequence[Image.Image]) -> list[list[str]]:
        """The replies to each row from the lowest rung to the highest."""
        columns = []
        for tokens in self.config.ladder:
            views = [at_budget(image, tokens, self.session.model.config.vlm_config) for image in images]
            batch = [(view, row.question) for (view, _), row in zip(views, rows, strict=True)]
            answers = ask_batch(self.session, batch, budget=views[0][1], zoom="never")
            columns.append([answer.text for answer in answers])
        return [list(replies) for replies in zip(*columns, strict=True)]

    def label(self, batch: list[tuple[Row, Image.Image]]) -> list[GateRecord]:
        """A record for each row."""
        rows = [row for row, _ in batch]
        replies = self.climb(rows, [image for _, image in batch])
        right = verdicts(self.judge, rows, [row.answers for row in rows], replies)
        agrees = verdicts(self.judge, rows, [(texts[-1],) for texts in replies], replies)
        return [
            GateRecord(
                id=row.id,
                image_id=row.image_id,
                question=row.question,
                answers=row.answers,
                ladder=list(self.config.ladder),
                replies=replies[place],
                right=right[place] if row.answers else None,
                agrees=agrees[place],
            )
            for place, row in enumerate(rows)
        ]


def _settings(config: LabelGatesConfig) -> dict[str, Any]:
    """Everything that labels depend on besides model and rows."""
    names = ("ladder", "prompt_suffix", "system_prompt", "max_new_tokens", "dtype", "batch_size")
    values = {name: getattr(config, name) for name in names}
    return {**data_settings(config), **values, "judge": dataclasses.asdict(config.judge)}


def run(config: LabelGatesConfig) -> None:
    """Label the rows into `config.output`, going on where it was stopped.

    Raises:
        ValueError: the judge, data or output do not fit.
    """
    rows = load_rows(config)
    session = open_session(config)
    labeler = GateLabeler(session, config, judge_for(config.judge, session))
    manifest = Manifest(STAGE, backbone_fingerprint(session.model), rows.fingerprint, _settings(config))
    make_labels(config.output, manifest, rows, config.shard_size, labeler)
