"""`label-gates`, the data of stage 3: the model's answers on a ladder of resolutions (paper III-B1).

Which rows teach the gate what is decided when the labels are loaded (`gate_labels`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ...asking.answers import greedy_answers
from ...asking.budgets import at_budget, check_ladder
from ...asking.fingerprints import backbone_fingerprint
from ...asking.judges import Judge, judge_for
from ...asking.session import Session, open_session
from ...data.bad_rows import BadRows
from ...data.readers import load_rows
from ...data.rows import Row
from ..common.label_store import Manifest, data_settings, make_labels
from .config import LabelGatesConfig


STAGE = "label-gates"


def _verdicts(
    judge: Judge, rows: Sequence[Row], truths: Sequence[tuple[str, ...]], replies: list[list[str]]
) -> list[list[bool]]:
    """Per row, whether each of its replies is right; a reply that occurs twice is judged once, an empty one is wrong.

    Args:
        truths: Per row; one without a truth that says something gets no reply right.
        replies: Per row, a reply per rung.
    """
    asked: dict[tuple[int, str], bool] = {}
    for number, (accepted, own) in enumerate(zip(truths, replies, strict=True)):
        for reply in own:
            if reply and any(truth.strip() for truth in accepted):
                asked[number, reply] = False
    keys = list(asked)
    if keys:
        found = judge.judge(
            [rows[number].question for number, _ in keys],
            [truths[number] for number, _ in keys],
            [reply for _, reply in keys],
        )
        asked.update(zip(keys, found, strict=True))
    return [[asked.get((number, reply), False) for reply in own] for number, own in enumerate(replies)]


@dataclasses.dataclass
class GateLabeler:
    """Labels the rows of a shard.

    Args:
        session: The model.
        config: Its `ladder` and `batch_size`.
        judge: Compares replies with each other and with the annotation.
    """

    session: Session
    config: LabelGatesConfig
    judge: Judge

    def __call__(self, rows: Sequence[Row], bad: BadRows) -> list[dict[str, Any]]:
        """The records of the usable rows, in order."""
        records = []
        for start in range(0, len(rows), self.config.batch_size):
            usable, images = [], []
            for row in rows[start : start + self.config.batch_size]:
                try:
                    images.append(row.load_image(self.session.processor.max_source_pixels))
                except ValueError as error:
                    bad.add(row.id, str(error))
                    continue
                usable.append(row)
            if usable:
                records += self._label(usable, images, bad)
        return records

    def _climb(self, rows: Sequence[Row], images: Sequence[Image.Image]) -> list[list[str]]:
        """Per row, the replies from the lowest rung to the highest."""
        questions, columns = [row.question for row in rows], []
        for tokens in self.config.ladder:
            views = [at_budget(image, tokens, self.session.model.config.vlm_config) for image in images]
            shown = [view for view, _ in views]
            budget: dict[str, Any] = views[0][1]
            columns.append(greedy_answers(self.session, shown, questions, zoom="never", **budget))
        return [list(replies) for replies in zip(*columns, strict=True)]

    def _label(self, rows: list[Row], images: list[Image.Image], bad: BadRows) -> list[dict[str, Any]]:
        try:
            replies = self._climb(rows, images)
        except ValueError as error:  # of the processor, about one image
            if len(rows) > 1:
                pairs = zip(rows, images, strict=True)
                return [record for row, image in pairs for record in self._label([row], [image], bad)]
            bad.add(rows[0].id, str(error))
            return []
        right = _verdicts(self.judge, rows, [row.answers for row in rows], replies)
        agrees = _verdicts(self.judge, rows, [(own[-1],) for own in replies], replies)
        return [
            {
                "id": row.id,
                "image_id": row.image_id,
                "question": row.question,
                "answers": list(row.answers),
                "ladder": list(self.config.ladder),
                "replies": own,
                "right": verdicts if row.answers else None,
                "agrees": agreement,
            }
            for row, own, verdicts, agreement in zip(rows, replies, right, agrees, strict=True)
        ]


def _settings(config: LabelGatesConfig) -> dict[str, Any]:
    """Everything that labels depend on besides model and rows."""
    names = ("ladder", "prompt_suffix", "system_prompt", "max_new_tokens", "dtype", "batch_size")
    chosen = {name: getattr(config, name) for name in names}
    return {**data_settings(config), **chosen, "judge": dataclasses.asdict(config.judge)}


def run(config: LabelGatesConfig) -> None:
    """Label the rows into `config.output`, going on where it was stopped.

    Raises:
        ValueError: The ladder, the judge, data or output do not fit.
    """
    check_ladder(config.ladder)
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}.")
    rows = load_rows(config)
    session = open_session(config)
    labeler = GateLabeler(session, config, judge_for(config.judge, session))
    manifest = Manifest(STAGE, backbone_fingerprint(session.model), rows.fingerprint, _settings(config))
    make_labels(config.output, manifest, rows, config.shard_size, labeler)
