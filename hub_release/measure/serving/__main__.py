"""The server under load and faults, on this machine: `python -m hub_release.measure.serving`.

Starts servers with the demo on free ports of 127.0.0.1, asks them, and compares every answer with that of `generate`
alone. The parts:

load        many requests at once on two replicas, a quarter of them streamed
throughput  one request at a time against many at once, for the demo's short answers and for long ones
killed      a replica is killed in the middle
left        clients leave before their answers come
ended       SIGTERM while requests are under way
fuzz        malformed requests
memory      resident memory over many requests
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hub_release.measure.serving.faults import (
    ended_while_it_answers,
    memory_over,
    with_a_killed_replica,
    with_clients_that_leave,
)
from hub_release.measure.serving.fuzz import fuzz
from hub_release.measure.serving.load import load
from hub_release.measure.serving.questions import Asked, body_of, mixed_questions
from hub_release.measure.serving.server import Server, running
from hub_release.measure.serving.throughput import compared, talkative


DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "qzoom-demo"
CONCURRENCY = 32
LONG_TOKENS, LONGEST = 128, 400  # of answers for throughput, and of those that are broken off
# 32 bit: there a row's answer does not depend on its company
FLAGS = ("--dtype", "float32", "--gpus", "0")


@dataclass(frozen=True)
class Plan:
    """How much is asked.

    Args:
        model: folder of the checkpoint.
        asked: requests with their answers.
        share: of the full numbers of requests.
    """

    model: Path
    asked: list[Asked]
    share: float

    def count(self, full: int) -> int:
        """A number of requests, scaled."""
        return max(8, round(full * self.share))

    def repeated(self, full: int) -> list[Asked]:
        """So many requests, each as often as it takes."""
        return [self.asked[number % len(self.asked)] for number in range(self.count(full))]

    def long_body(self, seed: int) -> dict[str, Any]:
        """A request whose answers take a while."""
        body = body_of(self.model.name, "hello", None, temperature=2.0, n=2, seed=seed)
        return {**body, "max_tokens": LONGEST}


def _load(server: Server, plan: Plan) -> dict[str, Any]:
    asked = plan.repeated(512)
    return {"concurrency": CONCURRENCY, **load(server.address, asked, CONCURRENCY, stream_every=4).told(len(asked))}


def _throughput(server: Server, plan: Plan) -> dict[str, Any]:
    asked = plan.repeated(48)
    short = compared(server.address, asked, CONCURRENCY)
    asked = [Asked({**each.body, "max_tokens": LONG_TOKENS}) for each in asked]
    with tempfile.TemporaryDirectory() as scratch:
        copy = talkative(plan.model, Path(scratch), LONG_TOKENS)
        with running(copy, *server.flags) as other:
            return {"as_the_demo_answers": short, "long_answers": compared(other.address, asked, CONCURRENCY)}


def _killed(server: Server, plan: Plan) -> dict[str, Any]:
    return with_a_killed_replica(server, plan.repeated(256), CONCURRENCY)


def _left(server: Server, plan: Plan) -> dict[str, Any]:
    return with_clients_that_leave(server, plan.long_body(0), plan.count(16))


def _ended(server: Server, plan: Plan) -> dict[str, Any]:
    asked = [Asked(plan.long_body(number)) for number in range(8)]
    return ended_while_it_answers(server, asked, len(asked))


def _fuzz(server: Server, plan: Plan) -> dict[str, Any]:
    return fuzz(server.address, plan.asked[0].body, plan.count(500))


def _memory(server: Server, plan: Plan) -> dict[str, Any]:
    return memory_over(server, plan.asked, plan.count(2000), CONCURRENCY)


@dataclass(frozen=True)
class Setting:
    """A server: its flags, and whether its model never ends an answer early."""

    flags: tuple[str, ...]
    is_talkative: bool = False


TWO, ONE = Setting(("--replicas", "2")), Setting(("--replicas", "1"))
LONG = Setting(("--replicas", "2"), is_talkative=True)
# by name: the server, and what is done to it; parts with the same one share it, and `ended` is its last
PARTS: dict[str, tuple[Setting, Callable[[Server, Plan], dict[str, Any]]]] = {
    "load": (TWO, _load),
    "killed": (TWO, _killed),
    "left": (LONG, _left),
    "ended": (LONG, _ended),
    "fuzz": (ONE, _fuzz),
    "memory": (ONE, _memory),
    "throughput": (Setting(("--in-process",)), _throughput),
}


def measure(parts: list[str], plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs parts, each on its server.

    Args:
        parts: names of `PARTS`.
        plan: how much is asked.
        tell: takes a line about every part.
    """
    results: dict[str, Any] = {}
    for setting in dict.fromkeys(PARTS[name][0] for name in parts):
        with tempfile.TemporaryDirectory() as scratch:
            model = talkative(plan.model, Path(scratch), LONGEST) if setting.is_talkative else plan.model
            with running(model, *FLAGS, *setting.flags) as server:
                for name in [name for name in PARTS if name in parts and PARTS[name][0] == setting]:
                    began = time.monotonic()
                    results[name] = {"server": " ".join((*FLAGS, *setting.flags)), **PARTS[name][1](server, plan)}
                    tell(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(results[name])}")
    return results


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of the checkpoint (the demo)")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the full numbers of requests (1)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    count = max(8, round(64 * min(1.0, options.share)))
    plan = Plan(options.model, mixed_questions(options.model, count), options.share)
    conditions = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread a process",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "distinct_requests": count,
    }
    results = {"conditions": conditions, **measure(options.parts, plan, lambda line: print(line, flush=True))}
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
