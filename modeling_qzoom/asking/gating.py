"""What zoom="auto" gives at any gate threshold, from one plain pass and one that holds the gate open.

Per row, zoom="auto" gives what zoom="always" gives where the gate's probability reaches the threshold, and what
zoom="never" gives where it does not. So a pass that holds every gate open, which also yields the probabilities, and a
plain pass tell what every threshold gives without decoding again.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from .answers import Answer


# options of `generate` under which every gate opens and is asked nevertheless
HELD_OPEN: dict[str, Any] = {"zoom": "auto", "gate_threshold": 0.0}


def derive_auto(never: Answer, always: Answer, gate_threshold: float) -> Answer:
    """What zoom="auto" gives for a row at a threshold.

    Args:
        never: plain answer to the row.
        always: answer to it with the gate held open; without a gate, with zoom="always".
        gate_threshold: probability from which on the row zooms.
    """
    probability = always.report.gate_probability
    if probability is None or probability >= gate_threshold:
        return always
    return replace(never, report=replace(never.report, reason="gate_closed", gate_probability=probability))


def auto_sums(never: np.ndarray, always: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(t,) sums over rows of a figure of zoom="auto", at many thresholds at once.

    Args:
        never: (n,) the figure of each row's plain answer.
        always: (n,) the figure of its answer with the gate held open.
        probabilities: (n,) of the gate.
        thresholds: (t,) probabilities from which on a row zooms.
    """
    order = np.argsort(probabilities, kind="stable")
    below = np.searchsorted(probabilities[order], thresholds)  # rows whose gate stays closed at each threshold
    closed, opened = (
        np.concatenate([[0.0], np.cumsum(np.asarray(figures, dtype=float)[order])]) for figures in (never, always)
    )
    return closed[below] + opened[-1] - opened[below]
