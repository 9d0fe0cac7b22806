"""Answers a second: one request at a time against many at once, on one server, in one run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub_release.measure.serving.load import load
from hub_release.measure.serving.questions import Asked


ROUNDS = 3


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
    """The same requests one at a time and many at once, in turns, so that both meet the same machine.

    Returns:
        Seconds of both by round, and how many times as fast many at once are: over all rounds, and in each.
    """
    load(address, asked[:concurrency], concurrency)  # warm
    alone, together, tokens = [], [], 0
    for _ in range(ROUNDS):
        one = load(address, asked, 1)
        known = [Asked(each.body, one.texts.get(number)) for number, each in enumerate(asked)]
        many = load(address, known, concurrency)
        if one.failed or many.failed or many.wrong:
            raise RuntimeError(f"answers failed or differ: {one.told(len(asked))} {many.told(len(asked))}")
        alone.append(one.seconds)
        together.append(many.seconds)
        tokens = many.tokens
    return {
        "requests_a_round": len(asked),
        "concurrency": concurrency,
        "mean_answer_tokens": round(tokens / max(1, len(asked)), 1),
        "seconds_one_at_a_time": [round(each, 2) for each in alone],
        "seconds_at_once": [round(each, 2) for each in together],
        "ratio": round(sum(alone) / sum(together), 2),
        "ratios": [round(one / many, 2) for one, many in zip(alone, together, strict=True)],
    }
