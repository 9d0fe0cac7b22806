"""`find-heads`: which attention heads look at what a question asks about, measured on drawn pages."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import open_session
from ...data.extras import needed_for
from ...data.files import check_output_file, write_text
from .config import FindHeadsConfig, Heads, LabelRule
from .head_scores import HeadScores, measure_heads


logger = logging.getLogger(__name__)

_SHOWN = 8


def _best(scores: Tensor, count: int) -> list[tuple[int, int]]:
    """(layer, head) of the highest scores, best first; none with -inf."""
    order = scores.flatten().argsort(descending=True, stable=True)[:count].tolist()
    heads = [divmod(index, scores.shape[1]) for index in order]
    return [(layer, head) for layer, head in heads if scores[layer, head] > -torch.inf]


def _table(heads: list[tuple[int, int]]) -> Heads:
    """(layer, head) pairs by layer."""
    table: Heads = {}
    for layer, head in sorted(heads):
        table.setdefault(layer, []).append(head)
    return table


def choose_heads(scores: HeadScores, config: FindHeadsConfig) -> tuple[Heads, Heads]:
    """Grounding heads and sink heads.

    Heads whose maps are so faint that labels would ignore them (`LabelRule.faintest_peak`) come last.
    """
    strong = scores.peak >= LabelRule().faintest_peak
    grounding = _best(scores.grounding + strong, config.grounding_count)
    rest = scores.sink.clone()
    rest[rest < config.sink_share] = -torch.inf
    for layer, head in grounding:
        rest[layer, head] = -torch.inf
    return _table(grounding), _table(_best(rest, config.sink_count))


def _log_table(scores: HeadScores, grounding: Heads, sinks: Heads) -> None:
    """The best heads of either sort."""
    logger.info("%d questions, %.1f %% answered right", scores.answered, 100 * scores.right)
    for name, values, best in (("grounding", scores.grounding, grounding), ("sink", scores.sink, sinks)):
        for layer, head in _best(values, _SHOWN):
            mark = "*" if head in best.get(layer, []) else " "
            logger.info(
                "%-9s %s layer %2d head %2d: %.3f, peak %.4f",
                name,
                mark,
                layer,
                head,
                values[layer, head],
                scores.peak[layer, head],
            )


def _rounded(values: Tensor) -> dict[int, list[float]]:
    return {layer: [round(value, 4) for value in row] for layer, row in enumerate(values.tolist())}


def write_heads(path: str | Path, content: dict[str, Any]) -> None:
    """Write the YAML file that `label-regions` reads; a reader never sees half of it.

    Raises:
        ImportError: PyYAML is missing; the extra `stages` installs it.
    """
    with needed_for("The heads file needs PyYAML"):
        import yaml
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=119))


def run(config: FindHeadsConfig) -> None:
    """Measure, choose and write `config.output`. One process does it all.

    Raises:
        ValueError: the model answers nothing.
    """
    from accelerate import PartialState

    check_output_file(config.output, "output")
    if not PartialState().is_main_process:
        return
    session = open_session(config)
    scores = measure_heads(session, config)
    grounding, sinks = choose_heads(scores, config)
    _log_table(scores, grounding, sinks)
    write_heads(
        config.output,
        {
            "grounding_heads": grounding,
            "sink_heads": sinks,
            "query_tokens": config.query_tokens,
            "model": config.model,
            "backbone": backbone_fingerprint(session.model),
            "max_tokens": session.processor.max_tokens,
            "right_answers": round(scores.right, 4),
            "scores": {"grounding": _rounded(scores.grounding), "sink": _rounded(scores.sink)},
        },
    )
    logger.info("grounding heads %s, sink heads %s, written to %s", grounding, sinks, config.output)
