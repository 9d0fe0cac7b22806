"""What held-out rows cost: FLOPs of the prefill under options, and the lengths that they depend on."""

from typing import Any

from ... import ZoomReport
from ...asking.chats import render
from ...asking.session import Session
from ...cost_qzoom import PrefillCost, Prompt
from ...data.rows import Row
from ...prompt_qzoom import marker_ids
from ...zoom_options_qzoom import ZoomOptions, resolve_options


def options_under(session: Session, options: dict[str, Any]) -> ZoomOptions:
    """The options in force in a call with some.

    Args:
        session: the model.
        options: options of `generate`.

    Raises:
        ValueError: they do not fit the model.
    """
    model = session.model
    mrope = model.config.backbone.mrope
    return resolve_options(options, [model.generation_config], model.config, mrope=mrope)


def cost_under(session: Session, options: dict[str, Any]) -> PrefillCost:
    """FLOPs of the model under options.

    Args:
        session: the model.
        options: options of `generate`.

    Raises:
        ValueError: they do not fit the model.
    """
    return PrefillCost(session.model.config, options_under(session, options))


def prompt_of(session: Session, row: Row, report: ZoomReport) -> Prompt:
    """Lengths of a row's prompt, from its text and the grid of its image.

    Args:
        session: the model.
        row: the row.
        report: report of a pass in which the region branch ran, which knows the grid.
    """
    config = session.model.config
    text = render(session.processor, [(row.question, None)], session.config)
    ids = session.processor.tokenizer(text).input_ids
    suffix = ids[ids.index(config.image_token_id) + 1 :]
    markers = marker_ids(config)
    closes = markers is not None and suffix[:1] == [markers[1]]
    assert report.heatmap is not None  # the region branch ran
    height, width = report.heatmap.shape
    return Prompt(len(ids) - 1 + height * width, len(suffix) - closes, (height, width))
