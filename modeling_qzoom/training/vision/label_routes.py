"""`label-routes`, the router's data: which configurations of VISOR answer a row rightly."""

import collections
import dataclasses
import logging
from typing import Any

from PIL import Image

from ...asking.answers import answer_batch, prepare
from ...asking.fingerprints import backbone_fingerprint
from ...asking.judges import Judge, judge_for
from ...asking.session import Session, open_session
from ...data.readers import load_rows
from ...data.rows import Row
from ..common.label_store import Manifest, data_settings, make_labels, read_labels
from ..common.labelling import Labeler
from ..common.verdicts import verdicts
from .config import LabelRoutesConfig
from .configurations import chosen_configurations, letters_of
from .route_record import RouteRecord


logger = logging.getLogger(__name__)

STAGE = "label-routes"


class RouteLabeler(Labeler[tuple[Row, Image.Image], RouteRecord]):
    """Labels the rows of a shard with what each configuration answers.

    Args:
        session: the model.
        names: names of the configurations.
        judge: who decides whether an answer is right.
        batch_size: rows per call of `generate`.
    """

    def __init__(self, session: Session, names: list[str], judge: Judge, batch_size: int) -> None:
        super().__init__(session, batch_size)
        self.names, self.letters, self.judge = names, letters_of(session.model.config, names), judge

    def load(self, row: Row) -> tuple[Row, Image.Image]:
        """The row and its image."""
        if not row.answers:
            raise ValueError("it has no answer to judge by")
        return row, self.image_of(row)

    def label(self, batch: list[tuple[Row, Image.Image]]) -> list[RouteRecord]:
        """A record for each row."""
        rows = [row for row, _ in batch]
        inputs = prepare(self.session, [(image, row.question) for row, image in batch])
        columns = [
            [answer.text for answer in answer_batch(self.session, inputs, zoom="never", vision=name)]
            for name in self.names
        ]
        replies = [list(texts) for texts in zip(*columns, strict=True)]
        right = verdicts(self.judge, rows, [row.answers for row in rows], replies)
        return [
            RouteRecord(row.id, row.question, row.answers, self.names, self.letters, replies[place], right[place])
            for place, row in enumerate(rows)
        ]


def _settings(config: LabelRoutesConfig, session: Session, names: list[str]) -> dict[str, Any]:
    """Everything that labels depend on besides backbone and rows."""
    judge = dataclasses.asdict(config.judge)
    for name in ("base_url", "api_key_variable", "concurrency"):  # how a judge is reached does not change its mind
        del judge[name]
    options = ("prompt_suffix", "system_prompt", "max_new_tokens", "dtype", "batch_size")
    return {
        **data_settings(config),
        **{name: getattr(config, name) for name in options},
        **{name: getattr(session.processor, name) for name in ("min_tokens", "max_tokens")},
        "configurations": dict(zip(names, letters_of(session.model.config, names))),
        "judge": judge,
    }


def run(config: LabelRoutesConfig) -> None:
    """Label the rows into `config.output`, going on where it was stopped.

    Raises:
        ValueError: data, configurations, judge or output do not fit.
    """
    rows = load_rows(config, needs_answer=True)
    session = open_session(config)
    names = chosen_configurations(session.model.config, config.configurations)
    judge = judge_for(config.judge, session)
    settings = _settings(config, session, names)
    manifest = Manifest(STAGE, backbone_fingerprint(session.model), rows.fingerprint, settings)
    labeler = RouteLabeler(session, names, judge, config.batch_size)
    make_labels(config.output, manifest, rows, config.shard_size, labeler)
    right: collections.Counter[str] = collections.Counter()
    count = 0
    for record in map(RouteRecord.from_row, read_labels(config.output, STAGE, None)):
        right.update(name for name, verdict in zip(record.configurations, record.right) if verdict)
        count += 1
    for name in names:
        logger.info("%s: %d of %d rows right", name, right[name], count)
