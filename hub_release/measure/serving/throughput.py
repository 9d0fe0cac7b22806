"""Answers a second: one request at a time against many at once, on one server, in one run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub_release.measure.serving.load import load
from hub_release.measure.serving.questions import Asked


def talkative(model: Path, folder: Path, new_tokens: int) -> Path:
    """A copy of a checkpoint that never ends an answer before so many tokens, as a large model seldom would.

    Args:
        model: folder of the checkpoint.
        folder: where the copy is made, under the same name.
        new_tokens: `min_new_tokens` of its generation config.
    """
    copy = folder / model.name
    shutil.copytree(model, copy)
    path = copy / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "min_new_tokens": new_tokens}), encoding="utf-8")
    return copy


def compared(address: str, asked: Sequence[Asked], concurrency: int) -> dict[str, Any]:
    """The same requests one at a time and many at once; both must get the same answers.

    Returns:
        Figures of both, and how many times as fast many at once are.
    """
    load(address, asked[:concurrency], concurrency)  # warm
    alone = load(address, asked, 1)
    known = [Asked(each.body, alone.texts.get(number)) for number, each in enumerate(asked)]
    together = load(address, known, concurrency)
    return {
        "one_at_a_time": alone.told(len(asked)),
        "at_once": {"concurrency": concurrency, **together.told(len(asked))},
        "mean_answer_tokens": round(together.tokens / max(1, len(asked)), 1),
        "ratio": round(alone.seconds / together.seconds, 2),
    }
