"""The passes over held-out rows that calibration needs: plain, held open, and over candidate thresholds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ... import ZoomReport
from ...asking.answers import Answer, greedy_answers
from ...asking.chats import render
from ...asking.cost import PrefillCost, Prompt
from ...asking.judges import Judge
from ...asking.session import Session
from ...data.bad_rows import BadRows
from ...data.rows import Row
from ...prompt_qzoom import marker_ids
from ...zoom_options_qzoom import resolve_options
from .candidates import Candidate, Ranked, rank_candidates
from .config import CalibrateConfig
from .operating_points import Outcomes, Point, gated_points, single_point


logger = logging.getLogger(__name__)


_HELD_OPEN = {"zoom": "auto", "gate_threshold": 0.0}
_NO_REGION = {"region_threshold": 2.0, "region_threshold_mode": "absolute"}


@dataclass(frozen=True)
class Coarse:
    """A row after the first pass.

    Args:
        place: Its place among the rows.
        right: Whether the plain answer is right.
        gate: Probability of the gate; None without one.
        prompt: Lengths that its cost depends on.
        size: (width, height) of its image in pixels.
        boxes: What each region threshold makes of its heat map.
    """

    place: int
    right: bool
    gate: float | None
    prompt: Prompt
    size: tuple[int, int]
    boxes: list[tuple[int, int, int, int] | None]


def _prompt(session: Session, row: Row, report: ZoomReport) -> Prompt:
    """Lengths of a row's prompt, from its text and the grid of its image."""
    config = session.model.config
    text = render(session.processor, [(row.question, None)], session.config)
    ids = session.processor.tokenizer(text).input_ids
    behind = ids[ids.index(config.image_token_id) + 1 :]
    markers = marker_ids(config)
    closes = markers is not None and behind[:1] == [markers[1]]
    assert report.heatmap is not None  # the region branch runs for every row here
    height, width = report.heatmap.shape
    return Prompt(len(ids) - 1 + height * width, len(behind) - closes, (height, width))


class Calibration:
    """Held-out rows and what the passes over them gave.

    Args:
        session: The model.
        config: The stage's configuration.
        judge: Who decides whether an answer is right.
        rows: All rows; processes share them.
    """

    def __init__(self, session: Session, config: CalibrateConfig, judge: Judge, rows: Sequence[Row]) -> None:
        from accelerate import PartialState

        self.session, self.config, self.judge, self.rows = session, config, judge, rows
        self.state = PartialState()
        self.bad = BadRows(config.data)
        self.candidates = self._candidates()
        self.coarse: list[Coarse] = []

    def _candidates(self) -> list[Candidate]:
        held = self.session.model.config
        found = [
            Candidate(mode, threshold)
            for mode, thresholds in self.config.region_thresholds.items()
            for threshold in thresholds
        ]
        return list(dict.fromkeys([*found, Candidate(held.region_threshold_mode, held.region_threshold)]))

    def _gather(self, own: list[Any]) -> list[Any]:
        """What all processes found, in one list."""
        if self.state.num_processes == 1:
            return own
        from accelerate.utils import gather_object

        return gather_object(own)

    def _answers(
        self, rows: Sequence[Row], images: list[Image.Image], options: dict[str, Any]
    ) -> tuple[list[bool], list[str], list[ZoomReport]]:
        questions = [row.question for row in rows]
        answers, reports = greedy_answers(self.session, images, questions, reports=True, **options)
        return self.judge.judge(questions, [row.answers for row in rows], answers), answers, reports

    # --- first pass -------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """The first pass: plain answers, gate probabilities and heat maps of all usable rows.

        Raises:
            ValueError: More rows are unusable than not.
        """
        from tqdm.auto import tqdm

        own: list[Coarse] = []
        places = range(self.state.process_index, len(self.rows), self.state.num_processes)
        batch: list[tuple[int, Image.Image]] = []
        for place in tqdm(places, desc="coarse view", unit="row", disable=self.state.process_index > 0):
            try:
                batch.append((place, self.rows[place].load_image(self.session.processor.max_source_pixels)))
            except ValueError as error:
                self.bad.add(self.rows[place].id, str(error))
            if len(batch) == self.config.batch_size:
                own += self._look_at(batch)
                batch = []
        own += self._look_at(batch)
        self.coarse = sorted(self._gather(own), key=lambda row: row.place)
        self.bad.found = self._gather(self.bad.found)
        self.bad.check(len(self.coarse))

    def _look_at(self, batch: list[tuple[int, Image.Image]]) -> list[Coarse]:
        if not batch:
            return []
        rows, images = [self.rows[place] for place, _ in batch], [image for _, image in batch]
        try:
            right, _, reports = self._answers(rows, images, {**_HELD_OPEN, **_NO_REGION})
        except ValueError as error:
            if len(batch) > 1:  # find the image that the processor refuses
                return [found for item in batch for found in self._look_at([item])]
            self.bad.add(rows[0].id, str(error))
            return []
        min_side = self.session.model.config.backbone.min_box_side
        return [
            Coarse(
                place,
                right[index],
                reports[index].gate_probability,
                _prompt(self.session, rows[index], reports[index]),
                image.size,
                [candidate.box(reports[index], image.size, min_side) for candidate in self.candidates],
            )
            for index, (place, image) in enumerate(batch)
        ]

    def ranked(self) -> list[Ranked]:
        """The region thresholds that are worth decoding with, told from the rows that need a closer look.

        Raises:
            ValueError: None makes boxes as small as `largest_area` asks for.
        """
        needy = [row for row in self.coarse if not row.right] or self.coarse
        boxes, sizes = [row.boxes for row in needy], [row.size for row in needy]
        targets = [self.rows[row.place].box for row in needy]
        return rank_candidates(self.candidates, boxes, sizes, targets, self.config.largest_area)

    # --- zoomed passes ----------------------------------------------------------------------------------------------

    def cost(self, options: dict[str, Any]) -> PrefillCost:
        """FLOPs under these options.

        Raises:
            ValueError: They do not fit the model.
        """
        model = self.session.model
        mrope = model.config.backbone.mrope
        resolved = resolve_options(options, [model.generation_config], model.config, mrope=mrope)
        return PrefillCost(model.config, resolved)

    def closed(self) -> Outcomes:
        """What rows give whose gate stays closed."""
        cost = self.cost({})
        asked = self.session.model.zoom.gate is not None
        flops = [cost.skipped(row.prompt) if asked else cost.plain(row.prompt) for row in self.coarse]
        return self._outcomes([(row.right, False, row.prompt.visual, spent) for row, spent in zip(self.coarse, flops)])

    def plain_flops(self) -> float:
        """Sum over the rows of what the plain model costs."""
        cost = self.cost({})
        return float(sum(cost.plain(row.prompt) for row in self.coarse))

    def opened(self, options: dict[str, Any]) -> Outcomes:
        """What rows give whose gate opens.

        Args:
            options: How to crop.
        """
        from tqdm.auto import tqdm

        cost, own = self.cost(options), []
        step, size = self.state.num_processes, self.config.batch_size
        mine = range(self.state.process_index, len(self.coarse), step)
        starts = tqdm(range(0, len(mine), size), desc="zoomed", unit="batch", disable=self.state.process_index > 0)
        for start in starts:
            chosen = mine[start : start + size]
            rows = [self.rows[self.coarse[index].place] for index in chosen]
            images = [row.load_image(self.session.processor.max_source_pixels) for row in rows]
            right, answers, reports = self._answers(rows, images, {**_HELD_OPEN, **options})
            for index, is_right, answer, report in zip(chosen, right, answers, reports, strict=True):
                prompt = self.coarse[index].prompt
                spent = cost.of_answer(Answer(answer, report, prompt.tokens, prompt.suffix, prompt.grid))
                own.append((index, is_right, report.zoomed, prompt.visual + report.crop_tokens, spent))
        return self._outcomes([found for _, *found in sorted(self._gather(own))])

    @staticmethod
    def _outcomes(rows: Sequence[Sequence[Any]]) -> Outcomes:
        right, zoomed, tokens, flops = zip(*rows, strict=True)
        return Outcomes(np.array(right), np.array(zoomed), np.array(tokens), np.array(flops, dtype=float))

    # --- points -----------------------------------------------------------------------------------------------------

    def crop_budgets(self) -> list[dict[str, int]]:
        """Crop budgets to try, as options; the smallest bound gives way where it is larger.

        Raises:
            ValueError: Budgets for a backbone whose crops have one size.
        """
        held = self.session.model.config
        if not held.backbone.grid.has_budget:
            if self.config.crop_max_tokens:
                raise ValueError("crop_max_tokens: crops of this backbone always have one size; leave it out.")
            return [{}]
        wanted = self.config.crop_max_tokens or [held.crop_max_tokens or held.max_tokens]
        if None in wanted:
            raise ValueError("The crop's budget is unknown: list the budgets to try in crop_max_tokens.")
        low = held.crop_min_tokens
        return [
            {"crop_max_tokens": high, **({} if low is None else {"crop_min_tokens": min(low, high)})}
            for high in sorted(set(wanted))
        ]

    def points(self, ranked: Sequence[Ranked]) -> list[Point]:
        """Every point: the ranked region thresholds at the largest crop budget, the best of them at the others."""
        budgets = self.crop_budgets()
        closed, plain_flops = self.closed(), self.plain_flops()
        gates = [row.gate for row in self.coarse]
        found: list[Point] = []

        def add(options: dict[str, Any]) -> tuple[float, float]:
            opened = self.opened(options)
            if gates[0] is None:
                found.append(single_point(opened, options, plain_flops))
            else:
                found.extend(gated_points(closed, opened, np.array(gates), options, plain_flops))
            logger.info("%s: accuracy %.3f when every row zooms", options, opened.right.mean())
            return float(opened.right.mean()), -float(opened.flops.sum())

        tried = [(add({**entry.candidate.options, **budgets[-1]}), entry.candidate) for entry in ranked]
        best = max(tried, key=lambda pair: pair[0])[1]
        for budget in budgets[:-1]:
            add({**best.options, **budget})
        return found
