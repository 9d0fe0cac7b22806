"""`mine-fusion`, the data of stage 2: what the plain and the zoomed model answer, and who of them is right (III-D).

Every row is recorded, so that counts can be trusted and rows both got right can serve as anchors.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

from PIL import Image

from ...asking.answers import ask_batch
from ...asking.fingerprints import backbone_fingerprint, region_fingerprint
from ...asking.judges import Judge, judge_for
from ...asking.session import Session, open_session
from ...data.readers import load_rows
from ...data.rows import Row, Rows
from ...zoom_options_qzoom import ZoomOptions, resolve_options
from ..common.label_store import Manifest, data_settings, make_labels, read_labels
from ..common.labelling import Labeler
from .config import MineFusionConfig
from .record import FusionRecord


logger = logging.getLogger(__name__)

STAGE = "mine-fusion"
_ZOOM_SETTINGS = (
    "region_threshold",
    "region_threshold_mode",
    "crop_min_tokens",
    "crop_max_tokens",
    "position_alignment",
)
# newer options; labels made before these existed were made with their defaults
_LATER_SETTINGS = ("crop_budget", "crop_target_tokens", "region_blur", "region_min_peak", "region_min_contrast")
_CASES = {
    (True, False): "plain right, zoomed wrong (regressions)",
    (True, True): "both right",
    (False, True): "plain wrong, zoomed right",
    (False, False): "both wrong",
}


class FusionMiner(Labeler[tuple[Row, Image.Image], FusionRecord]):
    """Labels the rows of a shard with the plain and the zoomed answer.

    Args:
        session: the model.
        judge: who decides whether an answer is right.
        batch_size: rows per call of `generate`.
    """

    def __init__(self, session: Session, judge: Judge, batch_size: int) -> None:
        super().__init__(session, batch_size)
        self.judge = judge

    def load(self, row: Row) -> tuple[Row, Image.Image]:
        """The row and its image."""
        if not row.answers:
            raise ValueError("it has no answer to judge by")
        return row, self.image_of(row)

    def label(self, batch: list[tuple[Row, Image.Image]]) -> list[FusionRecord]:
        """A record for each row."""
        rows, questions = [row for row, _ in batch], [(image, row.question) for row, image in batch]
        plain = [answer.text for answer in ask_batch(self.session, questions, zoom="never")]
        always = ask_batch(self.session, questions, zoom="always")
        zoomed, reports = [answer.text for answer in always], [answer.report for answer in always]
        plain_right = self._judge(rows, plain)
        changed = [place for place, texts in enumerate(zip(plain, zoomed)) if texts[0] != texts[1]]
        zoomed_right = list(plain_right)
        verdicts = self._judge([rows[place] for place in changed], [zoomed[place] for place in changed])
        for place, verdict in zip(changed, verdicts):
            zoomed_right[place] = verdict
        return [
            FusionRecord(
                id=row.id,
                question=row.question,
                answers=row.answers,
                plain=plain[place],
                zoomed=zoomed[place],
                plain_right=plain_right[place],
                zoomed_right=zoomed_right[place],
                box=reports[place].box if reports[place].zoomed else None,
            )
            for place, row in enumerate(rows)
        ]

    def _judge(self, rows: list[Row], answers: list[str]) -> list[bool]:
        return self.judge.judge([row.question for row in rows], [row.answers for row in rows], answers)


def count_cases(records: Iterable[FusionRecord]) -> dict[str, int]:
    """How many rows fell under each of the four cases."""
    counts = collections.Counter((record.plain_right, record.zoomed_right) for record in records)
    return {name: counts[case] for case, name in _CASES.items()}


def _zoom_settings(options: ZoomOptions) -> dict[str, Any]:
    changed = [name for name in _LATER_SETTINGS if getattr(options, name) != getattr(ZoomOptions(), name)]
    return {name: getattr(options, name) for name in (*_ZOOM_SETTINGS, *changed)}


def _settings(config: MineFusionConfig, session: Session) -> dict[str, Any]:
    """Everything that labels depend on besides backbone and rows."""
    model = session.model
    mrope = model.config.backbone.mrope
    options = resolve_options({}, [model.generation_config], model.config, mrope=mrope)
    judge = dataclasses.asdict(config.judge)
    for name in ("base_url", "api_key_variable", "concurrency"):  # how a judge is reached does not change its mind
        del judge[name]
    names = ("prompt_suffix", "system_prompt", "max_new_tokens", "dtype", "batch_size")
    return {
        **data_settings(config),
        **{name: getattr(config, name) for name in names},
        **{name: getattr(session.processor, name) for name in ("min_tokens", "max_tokens")},
        "zoom": _zoom_settings(options),
        "judge": judge,
        "region_branch": region_fingerprint(model),
    }


def _check_answers(rows: Rows, data: str) -> None:
    """Check that a judge has something to judge by.

    Raises:
        ValueError: most rows have no answer.
    """
    without = sum(not row.answers for row in rows)
    if 2 * without > len(rows):
        raise ValueError(
            f"data={data}: {without} of {len(rows)} rows have no answer, which a judge needs; check answer_key."
        )


def run(config: MineFusionConfig) -> None:
    """Mine the rows into `config.output`, going on where it was stopped.

    Raises:
        ValueError: data, judge or output do not fit.
    """
    rows = load_rows(config)
    _check_answers(rows, config.data)
    session = open_session(config)
    judge = judge_for(config.judge, session)
    manifest = Manifest(STAGE, backbone_fingerprint(session.model), rows.fingerprint, _settings(config, session))
    make_labels(config.output, manifest, rows, config.shard_size, FusionMiner(session, judge, config.batch_size))
    for name, count in count_cases(map(FusionRecord.from_row, read_labels(config.output, STAGE, None))).items():
        logger.info("%s: %d", name, count)
