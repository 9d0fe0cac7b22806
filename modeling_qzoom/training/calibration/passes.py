"""The passes over held-out rows that calibration needs: the coarse view of each row, and every row zoomed."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from PIL import Image

from ... import ZoomReport
from ...asking.answers import ask_batch, in_batches
from ...asking.gating import HELD_OPEN
from ...asking.judges import Judge
from ...asking.session import Session
from ...cost_qzoom import Prompt
from ...data.bad_rows import BadRows
from ...data.rows import Row
from ...zoom_regions_qzoom import Box
from ..common.labelling import label_in_batches
from .candidates import Candidate
from .config import CalibrateConfig
from .costs import cost_under, options_under, prompt_of
from .operating_points import Outcomes


# no region reaches this threshold, so that every row gives its plain answer after gate and heat map are known
_NO_REGION = {"region_threshold": 2.0, "region_threshold_mode": "absolute"}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Coarse:
    """A row after the first pass.

    Attributes:
        place: place of the row among all rows.
        right: whether the plain answer is right.
        gate: probability of the gate; None without one.
        prompt: lengths that its cost depends on.
        size: (width, height) of its image in pixels.
        boxes: box that each candidate makes of its heat map.
    """

    place: int
    right: bool
    gate: float | None
    prompt: Prompt
    size: tuple[int, int]
    boxes: list[Box | None]


class Passes:
    """Runs a model over held-out rows; processes share them.

    Attributes:
        bad: rows that cannot be used.
        state: this process among those of the run.

    Args:
        session: the model.
        judge: who decides whether an answer is right.
        rows: all rows.
        config: options of the stage.
    """

    def __init__(self, session: Session, judge: Judge, rows: Sequence[Row], config: CalibrateConfig) -> None:
        self.session, self.judge, self.rows, self.batch_size = session, judge, rows, config.batch_size
        self.bad, self.state = BadRows(config.data), PartialState()

    def _share(self, count: int) -> range:
        """The places among `count` that are this process's."""
        return range(self.state.process_index, count, self.state.num_processes)

    def _gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes in one list."""
        if self.state.num_processes == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def _answers(
        self, rows: Sequence[Row], images: list[Image.Image], options: dict[str, Any]
    ) -> tuple[list[bool], list[ZoomReport]]:
        """Verdict and report of each row."""
        questions = [row.question for row in rows]
        batch = list(zip(images, questions, strict=True))
        answers = ask_batch(self.session, batch, **{**HELD_OPEN, **options})
        texts = [answer.text for answer in answers]
        verdicts = self.judge.judge(questions, [row.answers for row in rows], texts)
        return verdicts, [answer.report for answer in answers]

    def coarse(self, candidates: Sequence[Candidate]) -> list[Coarse]:
        """The first pass: plain answers, gate probabilities and boxes of all usable rows, in order.

        Args:
            candidates: region thresholds that make boxes of heat maps.

        Raises:
            ValueError: more rows are unusable than not.
        """
        from tqdm.auto import tqdm

        share = self._share(len(self.rows))
        places = {self.rows[place].id: place for place in share}

        def load(row: Row) -> tuple[int, Image.Image]:
            return places[row.id], row.load_image(self.session.processor.max_source_pixels)

        rows = (self.rows[place] for place in share)
        rows = tqdm(rows, desc="coarse view", unit="row", total=len(share), disable=self.state.process_index > 0)
        label = functools.partial(self._coarse_batch, candidates)
        labels = list(label_in_batches(rows, load, label, self.batch_size, self.bad))
        coarse = sorted(self._gather(labels), key=lambda row: row.place)
        self.bad.skipped = self._gather(self.bad.skipped)
        self.bad.check(len(coarse))
        return coarse

    def _coarse_batch(self, candidates: Sequence[Candidate], batch: list[tuple[int, Image.Image]]) -> list[Coarse]:
        rows, images = [self.rows[place] for place, _ in batch], [image for _, image in batch]
        right, reports = self._answers(rows, images, _NO_REGION)
        model, rules = self.session.model.config, options_under(self.session, {})
        return [
            Coarse(
                place,
                right[index],
                reports[index].gate_probability,
                prompt_of(self.session, rows[index], reports[index]),
                image.size,
                [candidate.box(reports[index], image.size, model, rules) for candidate in candidates],
            )
            for index, (place, image) in enumerate(batch)
        ]

    def zoomed(self, coarse: Sequence[Coarse], options: dict[str, Any]) -> Outcomes:
        """What the rows give when every gate opens.

        Args:
            coarse: rows after the first pass.
            options: how to crop, as options of `generate`.
        """
        from tqdm.auto import tqdm

        cost, outcomes = cost_under(self.session, options), []
        indices = tqdm(self._share(len(coarse)), desc="zoomed", unit="row", disable=self.state.process_index > 0)
        for batch in in_batches(indices, self.batch_size):
            rows = [self.rows[coarse[index].place] for index in batch]
            images = [row.load_image(self.session.processor.max_source_pixels) for row in rows]
            right, reports = self._answers(rows, images, options)
            for index, is_right, report in zip(batch, right, reports, strict=True):
                prompt = coarse[index].prompt
                flops = cost.of_report(prompt, report)
                outcomes.append((index, (is_right, report.zoomed, prompt.visual + report.crop_tokens, flops)))
        return Outcomes.of_rows(outcome for _, outcome in sorted(self._gather(outcomes)))
