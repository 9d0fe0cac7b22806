"""`calibrate`: thresholds, crop budgets and presets from held-out rows with answers.

One pass gives everything about the coarse view: no region reaches a threshold of 2, so every row falls back to its
plain answer after gate and heat map are known. Each further pass zooms every row under one way to crop. What any gate
threshold gives follows from these without decoding again (`points`).
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import QZoomConfig, ZoomReport
from ..backbones_qzoom import spec_for_config
from ..evaluation.asking import Answer
from ..evaluation.cost import PrefillCost, Prompt
from ..fused_pass_qzoom import marker_ids
from ..options_qzoom import OPTION_NAMES, resolve_options
from ..saving_qzoom import ADDON, FULL, check_target, staged, what_is_in
from .answers import greedy_answers
from .data import BadRows, Row, load_rows
from .files import check_output_file, read_json, write_json
from .judges import Judge, judge_for
from .points import Outcomes, Point, choose_presets, gated_points, single_point
from .prompts import render
from .region_thresholds import Candidate, Ranked, rank_candidates
from .session import Session, backbone_fingerprint, open_session, save_session
from .stage_configs import CalibrateConfig


logger = logging.getLogger(__name__)

DEFAULT = "balanced"
_RESTORE = "take the checkpoint's config.json from where it came from"
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
        min_side = spec_for_config(self.session.model.config.vlm_config).min_box_side
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
        mrope = spec_for_config(model.config.vlm_config).mrope
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
        if spec_for_config(held.vlm_config).square_crop:
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


def target_folder(config: CalibrateConfig) -> Path:
    """Where the presets go.

    Raises:
        ValueError: The model is no folder and no output is given, it is no Q-Zoom checkpoint, or the output folder
            holds another model or lies inside the model's.
    """
    source = Path(config.model) / "config.json"
    if source.is_file():
        if read_json(source, _RESTORE).get("model_type") != QZoomConfig.model_type:
            raise ValueError(
                f"model={config.model} is a plain VLM; calibrate a checkpoint whose branches are trained."
            )
    elif config.output is None:
        raise ValueError(f"model={config.model} is no folder whose config.json could be changed; give output=FOLDER.")
    folder, model = Path(config.output or config.model), Path(config.model)
    if model.is_dir() and folder.resolve() != model.resolve():
        if folder.resolve().is_relative_to(model.resolve()):
            raise ValueError(f"output={config.output} lies inside the model's folder, which is copied there.")
        check_target(folder, what_is_in(model) or FULL)
    elif not model.is_dir():
        check_target(folder, ADDON if config.load_in_4bit else FULL)
    return folder


def write_presets(folder: Path, presets: dict[str, dict[str, Any]]) -> None:
    """Put presets, and the balanced one's options as defaults, into a checkpoint's config.json.

    Raises:
        ValueError: The configuration does not take them.
    """
    path = folder / "config.json"
    values = read_json(path, _RESTORE)
    values |= {**presets[DEFAULT], "presets": presets, "effort": None}
    QZoomConfig.from_dict(dict(values))
    write_json(path, values)


def _store(session: Session, config: CalibrateConfig, folder: Path, presets: dict[str, dict[str, Any]]) -> None:
    source = Path(config.model)
    if not source.is_dir():
        save_session(session, folder, "addon" if config.load_in_4bit else "full")
    elif folder.resolve() != source.resolve():
        # as it is, whatever its format; a run's own checkpoints stay behind
        with staged(folder) as target:
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("trainer"))
    write_presets(folder, presets)
    logger.info("wrote presets into %s", folder / "config.json")


def _warn(session: Session, config: CalibrateConfig) -> None:
    """Of what would make the presets mean something else than what was measured."""
    if config.min_tokens or config.max_tokens:
        logger.warning(
            "calibrated at min_tokens=%s, max_tokens=%s, which the checkpoint's processor has to be given too",
            *(getattr(session.processor, name) for name in ("min_tokens", "max_tokens")),
        )
    held = vars(session.model.generation_config)
    winning = [name for name in (*OPTION_NAMES, "effort") if held.get(name) is not None]
    if winning:
        logger.warning("generation_config.json sets %s, which wins over what calibrate stores", winning)


def run(config: CalibrateConfig) -> None:
    """Choose presets and write them into the checkpoint.

    Raises:
        ValueError: Data, model or options do not fit, or `cost_at_most` cannot be met.
    """
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}.")
    if not 0 <= config.lose_at_most < 1:
        raise ValueError(f"lose_at_most must be a share of rows in [0, 1), got {config.lose_at_most}.")
    if not 0 < config.largest_area <= 1:
        raise ValueError(f"largest_area must be a share of the image in (0, 1], got {config.largest_area}.")
    folder = target_folder(config)
    check_output_file(folder / "config.json", "output")
    if config.report is not None:
        check_output_file(config.report, "report")
    rows = load_rows(config, needs_answer=True)
    session = open_session(config)
    calibration = Calibration(session, config, judge_for(config.judge, session), rows)
    calibration.crop_budgets()  # refuses them before anything runs
    calibration.look()
    ranked = calibration.ranked()
    points = calibration.points(ranked)
    chosen = choose_presets(points, config.lose_at_most, config.cost_at_most)
    for name, point in chosen.items():
        logger.info(
            "%s: accuracy %.3f, %.0f %% zoomed, %.0f visual tokens, %.2f × the plain prefill; %s",
            *(name, point.accuracy, 100 * point.zoomed_share, point.visual_tokens, point.relative_flops),
            point.options,
        )
    if chosen["accurate"].accuracy == 0:
        logger.warning("no row was answered right in any way, so the presets mean nothing; check judge and prompts")
    if chosen["accurate"].accuracy - chosen["fast"].accuracy > config.lose_at_most:
        logger.warning("no point within cost_at_most=%s loses as little as lose_at_most", config.cost_at_most)
    _warn(session, config)
    if not calibration.state.is_main_process:
        return
    _store(session, config, folder, {name: point.options for name, point in chosen.items()})
    if config.report is not None:
        report = {
            "config": asdict(config),
            "backbone": backbone_fingerprint(session.model),
            "data": {
                "fingerprint": rows.fingerprint,
                "rows": len(calibration.coarse),
                "skipped": calibration.bad.found,
            },
            "plain_accuracy": float(calibration.closed().right.mean()),
            "region_thresholds": [asdict(entry) for entry in ranked],
            "presets": {name: asdict(point) for name, point in chosen.items()},
            "points": [asdict(point) for point in points],
        }
        Path(config.report).parent.mkdir(parents=True, exist_ok=True)
        Path(config.report).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
