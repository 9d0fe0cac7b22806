"""The benchmark: every arm over drawn rows or a file's, and the figures of it as one JSON-ready dictionary."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from ..data.drawn.pages import named_settings
from ..data.drawn.questions import DrawnRow, draw_rows, page_kinds
from ..data.rows import Row
from .arms import ArmRunner, Item
from .figures import Figures, Record, add_costs, beside_summary, exact, ladder_point, pick, score_table, summarize
from .statistics import Interval


SUMMARY_NAMES = (
    "fine_accuracy_zoom",
    "fine_accuracy_plain_coarse",
    "fine_accuracy_plain_8x",
    "coarse_accuracy_zoom",
    "coarse_accuracy_plain",
    "region_recall",
    "region_area",
    "gate_auroc",
    "gating_loss",
    "zoomed_share_coarse",
)
# one row in so many is drawn as `multi`, and as many as `absent`, beside the requested rows
EXTRA_SHARE = 8
# number of unusable rows that are named in full; the rest are counted
NAMED = 5

logger = logging.getLogger(__name__)


def drawn_items(rows: Iterable[DrawnRow]) -> Iterator[Item]:
    """Drawn rows as the arms take them."""
    for row in rows:
        page, question = row.page, row.question
        yield Item(page.image, question.text, question.answer, question.kind, page.kind, question.box)


def measure_drawn(
    runner: ArmRunner,
    split: str = "test",
    seed: int = 0,
    rows: int = 2000,
    by_page_kind: bool = False,
    pages: str = "plain",
) -> dict[str, Any]:
    """All figures on freshly drawn pages.

    Args:
        runner: the arms.
        split: split that the pages belong to.
        seed: seed of the pages.
        rows: number of `fine` and `coarse` rows together; `multi` and `absent` rows come on top.
        by_page_kind: whether to give the summary of each kind of page.
        pages: how the pages are drawn, a name of `PAGE_SETTINGS`.

    Returns:
        `summary`, `intervals`, `by_page_kind`, `other` and `ladder`.

    Raises:
        ValueError: an unknown split or fewer than two rows.
        ImportError: the split "shifted" without matplotlib, or varied pages without the extra `pages`.
    """
    if rows < 2:
        raise ValueError(f"The benchmark needs at least two rows, one fine and one coarse, got {rows}.")
    settings = named_settings(pages)
    records = list(runner.run(drawn_items(draw_rows(split, seed, rows, settings=settings))))
    extra: list[Record] = []
    for kind in ("multi", "absent"):
        drawn = draw_rows(split, seed, max(1, rows // EXTRA_SHARE), (kind,), settings)
        extra += runner.run(drawn_items(drawn), derive=False, ladder=False)
    summary, other = summarize(records), beside_summary(records, extra)
    result = _result(summary, other, _ladder(runner, records))
    result["other"] |= {
        "extra_rows": {kind: sum(record.kind == kind for record in extra) for kind in ("multi", "absent")},
        "fine_rows_without_box": sum(
            record.kind == "fine" and record.outcomes["always"].box is None for record in records
        ),
        "scores": score_table([*records, *extra]),
    }
    if by_page_kind:
        result["by_page_kind"] = {kind: _page_kind(records, kind) for kind in page_kinds(settings)}
    return result


def _page_kind(records: Sequence[Record], kind: str) -> dict[str, Any]:
    part = [record for record in records if record.page_kind == kind]
    figures = summarize(part)
    return {"rows": len(part), "summary": figures.values, "intervals": _as_lists(figures.intervals)}


def _as_lists(intervals: dict[str, Interval]) -> dict[str, list[float]]:
    return {name: list(ends) for name, ends in intervals.items()}


def _result(summary: Figures, other: Figures, ladder: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "summary": summary.values,
        "intervals": _as_lists(summary.intervals | other.intervals),
        "by_page_kind": {},
        "other": dict(other.values),
        "ladder": ladder,
    }


def _ladder(runner: ArmRunner, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Points of the Pareto picture, all over the same rows: the plain model's, then the zooming model's."""
    if not runner.ladder_rows:
        return []
    first = records[: runner.ladder_rows]
    arms = [(f"plain_{tokens}", "plain", str(tokens)) for tokens in runner.ladder]
    arms += [("auto", "zoom", runner.main.options.get("effort") or "auto")]
    arms += [(arm.name, "zoom", arm.options["effort"]) for arm in runner.presets]
    points = [ladder_point(first, *arm) for arm in arms]
    return [point for point in points if point is not None]


class FileItems:
    """A file's rows as the arms take them; rows that cannot be scored are skipped, named and counted.

    Args:
        rows: rows of the file.
    """

    def __init__(self, rows: Iterable[Row]):
        self.rows, self.skipped = rows, 0

    def __iter__(self) -> Iterator[Item]:
        for row in self.rows:
            if not row.answers:
                self._skip(row.id, "it has no answer to compare with")
                continue
            try:
                image = row.load_image()
            except (OSError, ValueError) as error:
                self._skip(row.id, str(error))
                continue
            yield Item(image, row.question, row.answers, name=row.id)

    def skip(self, item: Item, reason: str) -> None:
        """Leave out a row that was given already."""
        self._skip(item.name, reason)

    def _skip(self, name: str, reason: str) -> None:
        self.skipped += 1
        if self.skipped <= NAMED:
            logger.warning("row %s is left out: %s", name, reason)


def measure_file(runner: ArmRunner, rows: Iterable[Row]) -> dict[str, Any]:
    """Accuracy and cost of the plain and the zooming model on rows of a file, which have no kinds and no boxes.

    Args:
        runner: the arms.
        rows: rows of the file.

    Returns:
        As `measure_drawn`, with a summary of its own: `exact_…`, `anls_…` and `relaxed_…` of `plain` (coarse budget)
        and `zoom` (zoom="auto"), and `zoomed_share`.

    Raises:
        ValueError: no row can be scored.
    """
    items = FileItems(rows)
    records = list(runner.run(items, derive=False, skip=items.skip))
    if not records:
        raise ValueError(
            f"None of the {items.skipped} rows can be scored: they lack an answer or a readable image, or the model "
            "refuses their questions."
        )
    summary, other = Figures(), Figures()
    for metric in ("exact", "anls", "relaxed"):
        for name, arm in (("zoom", "auto"), ("plain", "plain")):
            summary.mean(f"{metric}_{name}", pick(records, arm, attrgetter(metric)))
    summary.mean("zoomed_share", pick(records, "auto", lambda outcome: outcome.zoomed))
    other.difference("exact_zoom_minus_plain", exact(records, "auto"), exact(records, "plain"))
    add_costs(other, "auto", records, "auto")
    add_costs(other, "plain", records, "plain")
    result = _result(summary, other, _ladder(runner, records))
    result["other"] |= {"rows_measured": len(records), "rows_left_out": items.skipped}
    return result
