"""How long the recipe's steps took, on which machine."""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock


logger = logging.getLogger(__name__)


class Clock:
    """Seconds that each step has taken, over all runs of the recipe.

    Args:
        path: JSON file that keeps the seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()

    def read(self) -> dict[str, float]:
        """Seconds by step."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the time spent within it, also where it is interrupted."""
        logger.info("step %s", name)
        began = time.monotonic()
        try:
            yield
        finally:
            with self.lock:  # seeds may run side by side
                times = self.read()
                times[name] = round(times.get(name, 0) + time.monotonic() - began, 1)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(times, indent=2) + "\n")


def history_of(times: dict[str, float]) -> str:
    """How long the checkpoint took, of what `Clock` kept; further seeds do not count."""
    minutes = {"backbone": 0.0, "stages": 0.0}
    place = "a CPU"
    for name, seconds in times.items():
        if match := re.fullmatch(r"\d-\w+ \((.*)\)", name):
            place = match[1]
            minutes["backbone"] += seconds / 60
        elif "seed" not in name:
            minutes["stages"] += seconds / 60
    return (
        f"Trained from nothing by `hub_release/demo/recipe.py`: the backbone in {minutes['backbone']:.0f} minutes on "
        f"{place}, the stages of Q-Zoom after it in {minutes['stages']:.0f} minutes on CPU cores."
    )
