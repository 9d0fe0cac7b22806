"""From what happened to every row to the figures that are published, with their intervals."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from statistics import fmean
from typing import Any, TypeVar

from ..asking.metrics import area_share, auroc, is_covered
from ..zoom_regions_qzoom import Box
from .statistics import Interval, bootstrap_auroc, bootstrap_difference, bootstrap_mean


T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What one arm did with one row.

    Args:
        exact, anls, relaxed: scores of the answer in [0, 1].
        zoomed: whether a crop was used.
        gate_probability: the gate's probability in [0, 1]; None where the gate did not decide.
        box: the zoom box in source pixels, None without one.
        visual_tokens: number of visual tokens that the decoder saw.
        flops: FLOPs of the prefill, vision tower included.
    """

    exact: float
    anls: float
    relaxed: float
    zoomed: bool
    gate_probability: float | None
    box: Box | None
    visual_tokens: int
    flops: int


@dataclass(frozen=True)
class Record:
    """One row and what every arm did with it.

    Args:
        kind: kind of question; empty where the data has none.
        page_kind: kind of page; empty likewise.
        target: box that holds the answer, in source pixels.
        size: (width, height) of the image in pixels.
        outcomes: what each arm did: "plain" (coarse budget), "plain_8x", "always", "auto", and those of the ladder.
    """

    kind: str
    page_kind: str
    target: Box | None
    size: tuple[int, int]
    outcomes: dict[str, Outcome] = field(default_factory=dict)


@dataclass
class Figures:
    """Named figures and their bootstrap intervals; a figure over no rows is left out.

    Args:
        values: figures by name.
        intervals: (low, high) by name.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)

    def mean(self, name: str, values: Iterable[float]) -> None:
        """Add the mean of one value per row."""
        numbers = [float(value) for value in values]
        if numbers:
            self.values[name], self.intervals[name] = fmean(numbers), bootstrap_mean(numbers)

    def difference(self, name: str, first: Sequence[float], second: Sequence[float]) -> None:
        """Add the mean of paired differences."""
        if first:
            self.values[name] = fmean(map(float, first)) - fmean(map(float, second))
            self.intervals[name] = bootstrap_difference(first, second)

    def area(self, name: str, scores: Sequence[float], labels: Sequence[bool]) -> None:
        """Add an AUROC, if there are positives and negatives."""
        if len(set(labels)) == 2:
            self.values[name], self.intervals[name] = auroc(scores, labels), bootstrap_auroc(scores, labels)


def pick(records: Sequence[Record], arm: str, get: Callable[[Outcome], T]) -> list[T]:
    """A value of an arm's outcome for every record that has that arm."""
    return [get(record.outcomes[arm]) for record in records if arm in record.outcomes]


def exact(records: Sequence[Record], arm: str) -> list[float]:
    """Whether each answer of an arm is exactly right."""
    return pick(records, arm, lambda outcome: outcome.exact)


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """The records with questions of a kind."""
    return [record for record in records if record.kind == kind]


def summarize(records: Sequence[Record]) -> Figures:
    """The summary over `fine` and `coarse` rows, under the names of the README."""
    fine, coarse = of_kind(records, "fine"), of_kind(records, "coarse")
    both = [record for record in records if record.kind in ("fine", "coarse")]
    figures = Figures()
    figures.mean("fine_accuracy_zoom", exact(fine, "always"))
    figures.mean("fine_accuracy_plain_coarse", exact(fine, "plain"))
    figures.mean("fine_accuracy_plain_8x", exact(fine, "plain_8x"))
    figures.mean("coarse_accuracy_zoom", exact(coarse, "auto"))
    figures.mean("coarse_accuracy_plain", exact(coarse, "plain"))
    boxes = [record.outcomes["always"].box for record in fine]
    figures.mean(
        "region_recall",
        [
            record.target is not None and is_covered(box, record.target)
            for box, record in zip(boxes, fine, strict=True)
        ],
    )
    figures.mean(
        "region_area",
        [area_share(box, record.size) for box, record in zip(boxes, fine, strict=True) if box is not None],
    )
    pairs = [(record.outcomes["always"].gate_probability, record.kind == "fine") for record in both]
    gated = [(probability, is_fine) for probability, is_fine in pairs if probability is not None]
    figures.area("gate_auroc", [probability for probability, _ in gated], [is_fine for _, is_fine in gated])
    figures.difference("gating_loss", exact(both, "always"), exact(both, "auto"))
    figures.mean("zoomed_share_coarse", pick(coarse, "auto", lambda outcome: outcome.zoomed))
    return figures


def add_costs(figures: Figures, prefix: str, records: Sequence[Record], arm: str) -> None:
    """Add an arm's means per row: `visual_tokens_<prefix>` and `prefill_gflops_<prefix>`."""
    figures.mean(f"visual_tokens_{prefix}", pick(records, arm, lambda outcome: outcome.visual_tokens))
    figures.mean(f"prefill_gflops_{prefix}", pick(records, arm, lambda outcome: outcome.flops / 1e9))


def beside_summary(records: Sequence[Record], extra: Sequence[Record]) -> Figures:
    """What is reported beside the summary.

    Args:
        records: `fine` and `coarse` rows.
        extra: `multi` and `absent` rows, which have the arms "plain" and "auto" only.
    """
    figures = Figures()
    for kind in ("multi", "absent"):
        part = of_kind(extra, kind)
        figures.mean(f"{kind}_accuracy_zoom", exact(part, "auto"))
        figures.mean(f"{kind}_accuracy_plain", exact(part, "plain"))
        figures.mean(f"{kind}_zoomed_share", pick(part, "auto", lambda outcome: outcome.zoomed))
    fine, coarse = of_kind(records, "fine"), of_kind(records, "coarse")
    figures.mean("fine_accuracy_auto", exact(fine, "auto"))
    figures.mean("zoomed_share_fine", pick(fine, "auto", lambda outcome: outcome.zoomed))
    large = [record for record in fine if "plain_8x" in record.outcomes]
    figures.difference("fine_zoom_minus_plain_8x", exact(large, "always"), exact(large, "plain_8x"))
    figures.difference("coarse_zoom_minus_plain", exact(coarse, "auto"), exact(coarse, "plain"))
    for name, part in (("fine", fine), ("coarse", coarse)):
        add_costs(figures, f"{name}_auto", part, "auto")
        add_costs(figures, f"{name}_plain", part, "plain")
    add_costs(figures, "fine_plain_8x", fine, "plain_8x")
    return figures


def score_table(records: Sequence[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean exact, ANLS and relaxed scores by kind of question and arm; arms of the ladder are left out."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind in dict.fromkeys(record.kind for record in records):
        part = of_kind(records, kind)
        arms = [arm for arm in ("plain", "plain_8x", "always", "auto") if arm in part[0].outcomes]
        table[kind] = {arm: scores(part, arm) for arm in arms}
    return table


def scores(records: Sequence[Record], arm: str) -> dict[str, float]:
    """Mean exact, ANLS and relaxed scores of an arm."""
    return {name: fmean(pick(records, arm, attrgetter(name))) for name in ("exact", "anls", "relaxed")}


def ladder_point(records: Sequence[Record], arm: str, model: str, label: str) -> dict[str, Any] | None:
    """One point of the Pareto picture; None where no row ran this arm.

    Args:
        records: rows, of which those count that ran the arm.
        arm: name of the arm.
        model: "plain" or "zoom", the line that the point belongs to.
        label: what to write beside it.
    """
    rows = [record for record in records if arm in record.outcomes]
    if not rows:
        return None
    right = exact(rows, arm)
    point = {
        "model": model,
        "label": label,
        "rows": len(rows),
        "accuracy": fmean(right),
        "interval": list(bootstrap_mean(right)),
        "visual_tokens": fmean(pick(rows, arm, lambda outcome: outcome.visual_tokens)),
        "prefill_gflops": fmean(pick(rows, arm, lambda outcome: outcome.flops / 1e9)),
        **{name: value for name, value in scores(rows, arm).items() if name != "exact"},
    }
    for kind in ("fine", "coarse"):
        if part := of_kind(rows, kind):
            point[f"{kind}_accuracy"] = fmean(exact(part, arm))
    return point
