"""Seconds and peak memory of plain and zooming calls, side by side on one model, CPU or GPU.

Calls alternate, so that what else the machine does meets all of them. Ratios are of neighbouring calls; a shared CPU
tells the truth in processor seconds sooner than in wall-clock seconds, so both are there.
"""

import gc
import threading
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import psutil
import torch

from .. import QZoomForConditionalGeneration
from .questions import crop_options, question_inputs
from .rows import Setting


# seconds between two looks at the memory of this process
_LOOK_EVERY = 0.005


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds of a call, and seconds that this process's processors spent on it."""
    _synchronize(device)
    wall, spent = time.perf_counter(), time.process_time()
    function()
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - spent


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes in use during a call, weights included: allocated ones on a GPU, resident ones elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device)
    process, ended, peak = psutil.Process(), threading.Event(), [0]

    def look() -> None:
        while not ended.wait(_LOOK_EVERY):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        ended.set()
        watcher.join()
    return max(peak[0], process.memory_info().rss)


def _spread(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(ratios) == 1:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _threshold(
    model: QZoomForConditionalGeneration, inputs: dict[str, Any], options: dict[str, Any], count: int
) -> float:
    """A gate threshold at which exactly `count` rows zoom.

    Raises:
        ValueError: the gate cannot tell so many rows from the others.
    """
    rows = len(inputs["input_ids"])
    if count in (0, rows):
        return 0.0 if count else 1.5
    reports = model.generate(**inputs, **{**options, "gate_threshold": 0.0}).zoom_reports
    probabilities = sorted((report.gate_probability for report in reports), reverse=True)
    above, below = probabilities[count - 1], probabilities[count]
    if not above > below:
        raise ValueError(f"the gate gives the same probability to rows {count - 1} and {count}; try another batch.")
    return (above + below) / 2


@torch.no_grad()
def compare(
    model: QZoomForConditionalGeneration,
    setting: Setting,
    *,
    batch: int,
    zooming: int,
    runs: int,
    new_tokens: int = 1,
) -> dict[str, Any]:
    """Q-Zoom over the plain model on one batch: FLOPs in closed form, seconds, processor seconds, peak memory.

    Args:
        model: the model, on the device to measure.
        setting: what is measured.
        batch: rows of the batch.
        zooming: how many of them zoom.
        runs: measured pairs of calls; one more beforehand does not count.
        new_tokens: tokens of every answer. FLOPs are those of the prefill, so compare them with one token.
    """
    cost, device = setting.cost(), model.device
    vlm_config = model.config.vlm_config
    inputs = question_inputs(
        vlm_config, cost.coarse_grid, cost.crop_grid, rows=batch, text_tokens=setting.text_tokens, dtype=model.dtype
    )
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    options = {**crop_options(vlm_config, cost.crop_grid), **setting.options, **lengths, "return_zoom_reports": True}
    options["gate_threshold"] = _threshold(model, inputs, {**options, "zoom": "auto"}, zooming)

    def plain() -> Any:
        return model.generate(**inputs, **{**options, "zoom": "never"})

    def zoom() -> Any:
        return model.generate(**inputs, **{**options, "zoom": "auto"})

    plain()
    reports = zoom().zoom_reports
    if sum(report.zoomed for report in reports) != zooming:
        raise RuntimeError(f"{zooming} rows should zoom; the reports say {[report.reason for report in reports]}.")
    pairs = [(seconds_of(plain, device), seconds_of(zoom, device)) for _ in range(runs)]
    peaks = peak_bytes(plain, device), peak_bytes(zoom, device)
    return {
        "source_tokens": cost.plain.visual_tokens,
        "crop_tokens": cost.zoomed.visual_tokens - cost.plain.visual_tokens,
        "batch": batch,
        "zooming": zooming,
        "flops_over_plain": cost.mean_flops(zooming / batch) / cost.plain.flops,
        "seconds_over_plain": _spread([zoomed[0] / without[0] for without, zoomed in pairs]),
        "processor_over_plain": _spread([zoomed[1] / without[1] for without, zoomed in pairs]),
        "plain_seconds": _spread([without[0] for without, _ in pairs]),
        "peak_over_plain": peaks[1] / peaks[0],
        "peak_bytes": {"plain": peaks[0], "zoom": peaks[1]},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line for each comparison; seconds with their quartiles."""
    names = ("tokens", "batch", "zooming", "FLOPs", "seconds", "processor seconds", "peak memory")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{row['source_tokens']} + {row['crop_tokens']}", row["batch"], row["zooming"]]
        cells.append(f"{row['flops_over_plain']:.3f}")
        for key in ("seconds_over_plain", "processor_over_plain"):
            cells.append("{median:.2f} ({low:.2f} – {high:.2f})".format(**row[key]))
        cells.append(f"{row['peak_over_plain']:.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
