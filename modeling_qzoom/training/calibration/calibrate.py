"""`calibrate`: thresholds, crop budgets and presets from held-out rows with answers.

One pass gives everything about the coarse view: no region reaches a threshold of 2, so every row falls back to its
plain answer after gate and heat map are known. Each further pass zooms every row under one way to crop. What any gate
threshold gives follows from these without decoding again (`asking.gating`).
"""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import QZoomConfig
from ...asking.fingerprints import backbone_fingerprint
from ...asking.judges import judge_for
from ...asking.session import Session, open_session, save_session
from ...data.files import check_output_file, read_json, write_json, write_text
from ...data.readers import load_rows
from ...saving_qzoom import ADDON, FULL, check_target, staged, what_is_in
from ...zoom_options_qzoom import OPTION_NAMES
from .config import CalibrateConfig
from .operating_points import Point, choose_presets
from .passes import Passes
from .trials import closed_outcomes, crop_budgets, measure_points, rank_regions, region_candidates


logger = logging.getLogger(__name__)


# preset whose options become the checkpoint's defaults
DEFAULT = "balanced"
_RESTORE = "take the checkpoint's config.json from where it came from"


def target_folder(config: CalibrateConfig) -> Path:
    """Where the presets go.

    Raises:
        ValueError: the model is no folder and no output is given, it is no Q-Zoom checkpoint, or the output folder
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
        ValueError: the configuration does not take them.
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
    """Warn of what would make the presets mean something else than what was measured."""
    if config.min_tokens or config.max_tokens:
        logger.warning(
            "calibrated at min_tokens=%s, max_tokens=%s, which the checkpoint's processor has to be given too",
            *(getattr(session.processor, name) for name in ("min_tokens", "max_tokens")),
        )
    generation = vars(session.model.generation_config)
    winning = [name for name in (*OPTION_NAMES, "effort") if generation.get(name) is not None]
    if winning:
        logger.warning("generation_config.json sets %s, which wins over what calibrate stores", winning)


def _log(config: CalibrateConfig, presets: dict[str, Point]) -> None:
    """What the presets give, and what is odd about it."""
    for name, point in presets.items():
        logger.info(
            "%s: accuracy %.3f, %.0f %% zoomed, %.0f visual tokens, %.2f × the plain prefill; %s",
            *(name, point.accuracy, 100 * point.zoomed_share, point.visual_tokens, point.relative_flops),
            point.options,
        )
    if presets["accurate"].accuracy == 0:
        logger.warning("no row was answered right in any way, so the presets mean nothing; check judge and prompts")
    if presets["accurate"].accuracy - presets["fast"].accuracy > config.lose_at_most:
        logger.warning("no point within cost_at_most=%s loses as little as lose_at_most", config.cost_at_most)


def run(config: CalibrateConfig) -> None:
    """Choose presets and write them into the checkpoint.

    Raises:
        ValueError: data, model or options do not fit, or `cost_at_most` cannot be met.
    """
    folder = target_folder(config)
    check_output_file(folder / "config.json", "output")
    if config.report is not None:
        check_output_file(config.report, "report")
    rows = load_rows(config, needs_answer=True)
    session = open_session(config)
    passes = Passes(session, judge_for(config.judge, session), rows, config)
    budgets = crop_budgets(config, session.model.config)  # refuses them before anything runs
    candidates = region_candidates(config, session.model.config)
    coarse = passes.coarse(candidates)
    ranked = rank_regions(config, candidates, coarse, rows)
    closed = closed_outcomes(session, coarse)
    points = measure_points(passes, coarse, closed, ranked, budgets)
    presets = choose_presets(points, config.lose_at_most, config.cost_at_most)
    _log(config, presets)
    _warn(session, config)
    if not passes.state.is_main_process:
        return
    _store(session, config, folder, {name: point.options for name, point in presets.items()})
    if config.report is not None:
        report = {
            "config": asdict(config),
            "backbone": backbone_fingerprint(session.model),
            "data": {"fingerprint": rows.fingerprint, "rows": len(coarse), "skipped": passes.bad.skipped},
            "plain_accuracy": float(closed.right.mean()),
            "region_thresholds": [asdict(entry) for entry in ranked],
            "presets": {name: asdict(point) for name, point in presets.items()},
            "points": [asdict(point) for point in points],
        }
        Path(config.report).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(config.report), json.dumps(report, indent=2) + "\n")
