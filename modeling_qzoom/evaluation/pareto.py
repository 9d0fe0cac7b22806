"""The Pareto picture: accuracy over visual tokens, the plain model at a ladder of budgets against the zooming one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.extras import needed_for


PLAIN, ZOOM = "#6b7280", "#c2410c"
# offset in points, and alignment, of the labels of neighbouring points, which would print over each other
ZOOM_LABELS = (((-5, 5), "right", "bottom"), ((5, 16), "center", "bottom"), ((5, 5), "left", "bottom"))


def check_picture(path: Path) -> None:
    """Stop early where the picture could not be drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: It does not write the format that the path's suffix names.
    """
    with needed_for("The Pareto picture needs matplotlib"):
        from matplotlib.figure import Figure
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{path} names no kind of picture; its suffix has to be one of {', '.join(formats)}.")


def draw_pareto(points: Sequence[dict[str, Any]], path: Path, title: str | None = None) -> None:
    """Draw the ladder of a benchmark.

    Args:
        points: `ladder` of `measure_drawn` or `measure_file`: `model` ("plain" or "zoom"), `label`, `accuracy` and its
            `interval` as fractions, `visual_tokens` a row.
        path: Picture to write; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No points, or a format that matplotlib does not write.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    if not points:
        raise ValueError("There is no point to draw: run the benchmark with a ladder.")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for model, color, name, marker in (("plain", PLAIN, "plain model", "o"), ("zoom", ZOOM, "Q-Zoom", "D")):
        line = sorted((point for point in points if point["model"] == model), key=lambda p: p["visual_tokens"])
        if not line:
            continue
        tokens = [point["visual_tokens"] for point in line]
        accuracy = [100 * point["accuracy"] for point in line]
        # a mean may leave its percentile interval by a rounding error, which matplotlib would refuse
        spread = [
            [max(0.0, 100 * (point["accuracy"] - point["interval"][0])) for point in line],
            [max(0.0, 100 * (point["interval"][1] - point["accuracy"])) for point in line],
        ]
        axes.errorbar(tokens, accuracy, yerr=spread, color=color, marker=marker, capsize=3, label=name)
        for place, (point, x, y) in enumerate(zip(line, tokens, accuracy, strict=True)):
            offset, side, edge = (
                ((5, -6), "left", "top") if model == "plain" else ZOOM_LABELS[place % len(ZOOM_LABELS)]
            )
            axes.annotate(
                point["label"],
                (x, y),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                va=edge,
                fontsize=8,
                color=color,
            )
    axes.margins(x=0.12, y=0.12)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("visual tokens per question (mean)")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    if title:
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=160)
