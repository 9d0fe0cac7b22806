"""Markdown of what was measured, from the JSON files that evaluation and recipe write. Standard library only."""

from typing import Any


# rows of `short_table`: what is counted, its format, and the figure of each arm
_SHORT = (
    (
        "right answers, small print",
        ".1%",
        "fine_accuracy_plain_coarse",
        "fine_accuracy_auto",
        "fine_accuracy_plain_8x",
    ),
    ("right answers, large print", ".1%", "coarse_accuracy_plain", "coarse_accuracy_zoom", ""),
    ("rows that zoom, small print", ".1%", "", "zoomed_share_fine", ""),
    ("rows that zoom, large print", ".1%", "", "zoomed_share_coarse", ""),
    (
        "tokens of a row, small print",
        ".0f",
        "visual_tokens_fine_plain",
        "visual_tokens_fine_auto",
        "visual_tokens_fine_plain_8x",
    ),
    ("tokens of a row, large print", ".0f", "visual_tokens_coarse_plain", "visual_tokens_coarse_auto", ""),
    (
        "GFLOPs of a prefill, small print",
        ".1f",
        "prefill_gflops_fine_plain",
        "prefill_gflops_fine_auto",
        "prefill_gflops_fine_plain_8x",
    ),
)


def _interval(measured: dict[str, Any], name: str) -> str:
    low, high = measured.get("intervals", {}).get(name, (None, None))
    return "" if low is None else f"{low:.3f} – {high:.3f}"


def _beside(other: dict[str, Any] | None, part: str, name: str) -> str:
    value = None if other is None else other.get(part, {}).get(name)
    return "" if value is None else f"{value:.3f}"


def figure_table(measured: dict[str, Any], shifted: dict[str, Any] | None = None) -> str:
    """Figures with 95 % intervals and their conditions, as `python -m modeling_qzoom.evaluation` wrote them.

    Args:
        measured: figures of the test split.
        shifted: figures of the split with other fonts and layouts.
    """
    lines = ["| figure | test | 95 % interval | shifted |", "|---|---|---|---|"]
    for name, value in measured["summary"].items():
        lines.append(f"| {name} | {value:.3f} | {_interval(measured, name)} | {_beside(shifted, 'summary', name)} |")
    for name, value in measured.get("other", {}).items():
        if name.startswith(("multi_", "absent_")):
            lines.append(f"| {name} | {value:.3f} | | {_beside(shifted, 'other', name)} |")
    conditions = ", ".join(f"{name} {value}" for name, value in measured["conditions"].items() if name != "command")
    return "\n".join(lines) + f"\n\n`{measured['conditions']['command']}`: {conditions}."


def short_table(measured: dict[str, Any]) -> str:
    """The README's table: Q-Zoom between the plain model at the same budget and at eight times it.

    Args:
        measured: on the test split, as for `figure_table`.
    """
    values, budget = measured["other"] | measured["summary"], measured["conditions"]["coarse_budget"][1]
    lines = [
        f"| | plain, {budget} tokens | Q-Zoom, {budget} tokens | plain, {8 * budget} tokens |",
        "|---|---|---|---|",
    ]
    for name, form, *figures in _SHORT:
        cells = [f" {values[figure]:{form}} " if figure else " " for figure in figures]
        lines.append(f"| {name} |{'|'.join(cells)}|")
    return "\n".join(lines)


def page_kind_table(measured: dict[str, Any]) -> str | None:
    """The summary by kind of page, None where it was not measured."""
    kinds = measured.get("by_page_kind")
    if not kinds:
        return None
    head = " | ".join(f"{kind} ({part['rows']} rows)" for kind, part in kinds.items())
    lines = [f"| figure, by kind of page | {head} |", "|---" * (len(kinds) + 1) + "|"]
    for name in measured["summary"]:
        lines.append(f"| {name} | {' | '.join(_beside(part, 'summary', name) for part in kinds.values())} |")
    return "\n".join(lines)


def spread_table(spread: dict[str, Any]) -> str:
    """Lowest, mean and highest of every figure over seeds.

    Args:
        spread: content of `evaluation/seeds.json`, as the demo's recipe writes it.
    """
    lines = [f"{spread['seeds']} seeds of the last stages, {spread['rows']} test rows each:", ""]
    lines += ["| figure | lowest | mean | highest |", "|---|---|---|---|"]
    for name, figure in spread["spread"].items():
        lines.append(f"| {name} | {figure['lowest']:.3f} | {figure['mean']:.3f} | {figure['highest']:.3f} |")
    return "\n".join(lines)


def times_table(seconds: dict[str, float]) -> str:
    """Minutes by step of the training recipe."""
    lines = ["| step | minutes |", "|---|---|"]
    lines += [f"| {name} | {value / 60:.1f} |" for name, value in seconds.items()]
    return "\n".join(lines)
