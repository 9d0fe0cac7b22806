"""Runs the arms that a benchmark compares: the plain model at several budgets, and the zooming one.

The zooming arm decodes once with every gate held open, and "auto" at any threshold follows from it and from the plain
arm (`asking.gating`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from transformers import BatchFeature

from .. import QZoomForConditionalGeneration, QZoomProcessor
from ..asking.answers import BATCH_SIZE, Answer, answer_batch, in_batches, prepare
from ..asking.budgets import Budget, coarse_budget, plain_budget
from ..asking.config import ModelConfig
from ..asking.cost import answer_flops
from ..asking.gating import HELD_OPEN, derive_auto
from ..asking.metrics import Truth, anls, exact_match, relaxed_match
from ..asking.session import Session
from ..cost_qzoom import PrefillCost
from ..zoom_options_qzoom import ZoomOptions, resolve_options
from ..zoom_regions_qzoom import Box
from .figures import Outcome, Record


# longest answer to a drawn question, in tokens
MAX_NEW_TOKENS = 16
# the plain model's large budget, in coarse budgets
LARGE = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """A row to be run.

    Args:
        image: the picture in RGB.
        question: the question as the user asks it.
        truth: the right answer, or several.
        kind, page_kind: kinds of question and page; empty where the data has none.
        target: box that holds the answer, in pixels of the image.
        name: name of the row in its data, for messages.
    """

    image: Image.Image
    question: str
    truth: Truth
    kind: str = ""
    page_kind: str = ""
    target: Box | None = None
    name: str = ""


def options_in_force(model: QZoomForConditionalGeneration, options: dict[str, Any]) -> ZoomOptions:
    """The options that a call with these would run under.

    Raises:
        ValueError: an unknown preset or a value out of range.
    """
    mrope = model.config.backbone.mrope
    return resolve_options(options, (model.generation_config,), model.config, mrope=mrope)


def to_outcome(answer: Answer, truth: Truth, cost: PrefillCost) -> Outcome:
    """Scores and costs of an answer."""
    report = answer.report
    return Outcome(
        exact=float(exact_match(answer.text, truth)),
        anls=anls(answer.text, truth),
        relaxed=float(relaxed_match(answer.text, truth)),
        zoomed=report.zoomed,
        gate_probability=report.gate_probability,
        box=report.box,
        visual_tokens=answer.visual_tokens,
        flops=answer_flops(cost, answer),
    )


@dataclass(frozen=True)
class ZoomArm:
    """The zooming model under some options.

    Args:
        name: name of the arm's outcomes.
        options: options of `generate`, without `zoom`.
        used: all options in force, defaults included.
        cost: cost of its prefill.
    """

    name: str
    options: dict[str, Any]
    used: ZoomOptions
    cost: PrefillCost

    @property
    def held_open(self) -> ZoomOptions:
        """What decides the answers of rows that zoom: everything but the gate's threshold."""
        return replace(self.used, **HELD_OPEN)


class ArmRunner:
    """Runs rows through all arms, one batch of images at a time.

    Args:
        model: the model.
        processor: its processor.
        options: zoom options of the main arm, such as `{"effort": "fast"}`.
        batch_size: rows that are answered together.
        max_new_tokens: longest answer in tokens.
        ladder: budgets of the plain model, in merged visual tokens.
        ladder_rows: how many of the first rows run the ladder and the presets.

    Raises:
        ValueError: an unknown preset, `zoom` among the options, or a ladder for a backbone with one fixed token grid.
    """

    def __init__(
        self,
        model: QZoomForConditionalGeneration,
        processor: QZoomProcessor,
        options: dict[str, Any] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ladder: Sequence[int] = (),
        ladder_rows: int = 0,
    ):
        self.model, self.processor = model, processor
        self.session = Session(model, processor, ModelConfig(max_new_tokens=max_new_tokens))
        self.batch_size, self.ladder_rows = batch_size, ladder_rows
        self.coarse = coarse_budget(processor)
        if self.coarse is None and ladder:
            raise ValueError("A ladder of budgets needs a backbone that sees images at several resolutions.")
        self.ladder = sorted(set(ladder))
        if "zoom" in (options or {}):
            raise ValueError("zoom is no option of an arm: the arms themselves are 'auto', 'always' and 'never'.")
        self.main = self._zoom_arm("auto", options or {})
        arms = [self._zoom_arm(f"auto_{name}", {"effort": name}) for name in sorted(model.config.presets)]
        self.presets = [arm for arm in arms if arm.used != self.main.used] if ladder_rows else []

    def _zoom_arm(self, name: str, options: dict[str, Any]) -> ZoomArm:
        used = options_in_force(self.model, options)
        return ZoomArm(name, options, used, PrefillCost(self.model.config, used))

    @property
    def large(self) -> int | None:
        """The large plain budget in tokens; None on a fixed token grid."""
        return None if self.coarse is None else LARGE * self.coarse[1]

    def budget(self, tokens: int) -> Budget:
        """The coarse budget of a plain arm; the processor's own where its largest number is `tokens`."""
        return self.coarse if self.coarse is not None and tokens == self.coarse[1] else plain_budget(tokens)

    def run(
        self,
        items: Iterable[Item],
        *,
        derive: bool = True,
        ladder: bool = True,
        skip: Callable[[Item, str], None] | None = None,
    ) -> Iterator[Record]:
        """What every arm does with every row, in order.

        Args:
            items: any iterable; no more than one batch of it is in memory.
            derive: whether to take "auto" from the arms "plain" and "always", and to run the large budget
                on `fine` rows; otherwise "auto" itself runs, without "always".
            ladder: whether to run ladder and presets on the first rows.
            skip: is told of a row that processor or model refuses, and why; by default such a row is an error.

        Raises:
            ValueError: a row is refused, and there is no `skip`.
        """
        done = 0
        for batch in in_batches(items, self.batch_size):
            try:
                records = self._run_batch(batch, self.ladder_rows - done if ladder else 0, derive)
            except ValueError:
                if skip is None:
                    raise
                records = []
                for item in batch:  # to find out which row it is
                    place = done + len(records)
                    try:
                        records += self._run_batch([item], self.ladder_rows - place if ladder else 0, derive)
                    except ValueError as error:
                        skip(item, str(error))
            yield from records
            done += len(records)
            logger.info("%d rows done", done)

    def _run_batch(self, batch: Sequence[Item], on_ladder: int, derive: bool) -> list[Record]:
        """Every arm on the rows of a batch; ladder and presets on so many of the first ones."""
        run, everything = _BatchRun(self, batch), range(len(batch))
        first = everything[: max(0, on_ladder)]
        run.plain("plain", self.coarse, everything)
        run.zoom(self.main, everything, derive)
        if derive and self.large is not None:
            fine = [place for place in everything if batch[place].kind == "fine"]
            run.plain("plain_8x", plain_budget(self.large), fine)
        for tokens in self.ladder:
            run.plain(f"plain_{tokens}", self.budget(tokens), first)
        for arm in self.presets:
            run.zoom(arm, first, derive)
        return run.records()


class _BatchRun:
    """One batch of rows and its outcomes so far; inputs and plain answers are made once per budget."""

    def __init__(self, runner: ArmRunner, items: Sequence[Item]):
        self.runner, self.items = runner, items
        self.outcomes: list[dict[str, Outcome]] = [{} for _ in items]
        self._inputs: dict[tuple[Budget | None, tuple[int, ...]], BatchFeature] = {}
        self._plain: dict[tuple[Budget | None, int], Answer] = {}
        self._open: dict[tuple[ZoomOptions, int], Answer] = {}

    def _ask(self, budget: Budget | None, places: tuple[int, ...], **options: Any) -> list[Answer]:
        runner, key = self.runner, (budget, places)
        if key not in self._inputs:
            rows = [(self.items[place].image, self.items[place].question) for place in places]
            self._inputs[key] = prepare(runner.session, rows, budget)
        return answer_batch(runner.session, self._inputs[key], **options)

    def _record(self, name: str, place: int, answer: Answer, cost: PrefillCost) -> None:
        self.outcomes[place][name] = to_outcome(answer, self.items[place].truth, cost)

    def plain(self, name: str, budget: Budget | None, places: Sequence[int]) -> None:
        """Run the plain model on some rows."""
        missing = tuple(place for place in places if (budget, place) not in self._plain)
        if missing:
            for place, answer in zip(missing, self._ask(budget, missing, zoom="never"), strict=True):
                self._plain[budget, place] = answer
        for place in places:
            self._record(name, place, self._plain[budget, place], self.runner.main.cost)

    def zoom(self, arm: ZoomArm, places: Sequence[int], derive: bool) -> None:
        """Run the zooming model on some rows whose plain answers at the coarse budget are known."""
        if not places:
            return
        coarse = self.runner.coarse
        if not derive:
            answers = self._ask(coarse, tuple(places), **arm.options, zoom="auto")
            for place, answer in zip(places, answers, strict=True):
                self._record(arm.name, place, answer, arm.cost)
            return
        missing = tuple(place for place in places if (arm.held_open, place) not in self._open)
        if missing:
            options = {**arm.options, **HELD_OPEN}
            for place, answer in zip(missing, self._ask(coarse, missing, **options), strict=True):
                self._open[arm.held_open, place] = answer
        for place in places:
            opened = self._open[arm.held_open, place]
            auto = derive_auto(self._plain[coarse, place], opened, arm.used.gate_threshold)
            self._record(arm.name, place, auto, arm.cost)
            if arm is self.runner.main:
                self._record("always", place, opened, arm.cost)

    def records(self) -> list[Record]:
        """The rows with all their outcomes."""
        return [
            Record(item.kind, item.page_kind, item.target, item.image.size, outcomes)
            for item, outcomes in zip(self.items, self.outcomes, strict=True)
        ]
