"""From answers on a ladder of resolutions to gate labels (paper III-B1).

Correctness should be a step: wrong up to some resolution, right from there on. Rows of this kind say when the coarse
view is not enough; rows that are right everywhere say when it is. All others teach noise and are dropped.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

from .config import TrainGateConfig
from .record import GateRecord, GateRow


logger = logging.getLogger(__name__)

# index of a rung on the ladder, and the label of the view at this resolution: 1 where it is not enough
Rung = tuple[int, int]


def consistent_row(record: GateRecord) -> GateRow | str:
    """The row, or why it says nothing.

    A row without an annotation is judged by its consensus alone, the answer on which the two highest rungs agree.
    """
    if not all(record.agrees[-2:]):
        return "the two highest rungs disagree"
    verdicts = record.agrees if record.right is None else record.right
    if not verdicts[-1]:
        return "the consensus is not the annotation"
    wrong = verdicts.index(True)
    if not all(verdicts[wrong:]):
        return "right at a rung and wrong at a higher one"
    return GateRow(record, wrong)


def naive_row(record: GateRecord, rung: int) -> GateRow | str:
    """The row by one rung alone; nothing but a missing annotation drops it."""
    if record.right is None:
        return "there is no annotation"
    return GateRow(record, 0 if record.right[rung] else rung + 1)


def coarse_rung(ladder: Sequence[int], max_tokens: int | None) -> int:
    """Index of the rung nearest to the coarse budget; the lowest where there is no budget."""
    if max_tokens is None:
        return 0
    return min(range(len(ladder)), key=lambda index: abs(math.log(ladder[index] / max_tokens)))


def select_rows(records: Sequence[GateRecord], config: TrainGateConfig, coarse: int = 0) -> list[GateRow]:
    """The rows to train on, in the records' order; counts them by kind.

    Args:
        records: labels of `label-gates`.
        config: options with `labeling`, `easy_share` and `seed`.
        coarse: index of the rung by which naive labels are made.

    Raises:
        ValueError: one of the two kinds of rows is missing.
    """
    rules: dict[str, Callable[[GateRecord], GateRow | str]] = {
        "consistent": consistent_row,
        "naive": lambda record: naive_row(record, coarse),
    }
    judged = [rules[config.labeling](record) for record in records]
    for reason, count in sorted(Counter(row for row in judged if isinstance(row, str)).items()):
        logger.info("%d of %d rows dropped: %s", count, len(records), reason)
    rows = [row for row in judged if isinstance(row, GateRow)]
    easy = [index for index, row in enumerate(rows) if not row.wrong]
    hard = [index for index, row in enumerate(rows) if row.wrong]
    logger.info("%d rows need no zoom, %d do at some rung", len(easy), len(hard))
    if not easy or not hard:
        raise ValueError(
            f"The gate needs rows that are right at every resolution (there are {len(easy)}) and rows that are wrong "
            f"at low ones only ({len(hard)}); one kind is missing. Take other data or another ladder."
        )
    most = len(easy) if config.labeling == "naive" else round(config.easy_share * len(hard))
    if len(easy) > most:
        easy = random.Random(f"easy/{config.seed}").sample(easy, most)
        logger.info("%d of the rows that need no zoom are kept", most)
    return [rows[index] for index in sorted([*easy, *hard])]


def draw_rung(row: GateRow, rungs: int, config: TrainGateConfig, rng: random.Random, coarse: int = 0) -> Rung:
    """The resolution at which a row is shown in an epoch, and its label there.

    Args:
        row: the row.
        rungs: number of rungs of the ladder.
        config: options with `labeling`, `skip_top` and `draw_high`.
        rng: source of the draws.
        coarse: index of the rung by which naive labels were made.
    """
    if config.labeling == "naive":
        return coarse, int(row.wrong > 0)
    shown_right = range(row.wrong, rungs - config.skip_top)
    if not row.wrong:
        return rng.choice(shown_right), 0
    if shown_right and rng.random() >= config.draw_high:
        return rng.choice(shown_right), 0
    return rng.choice(range(max(0, row.wrong - 2), row.wrong)), 1


def check_draws(rungs: int, config: TrainGateConfig) -> None:
    """Check that a ladder leaves something to draw.

    Args:
        rungs: number of rungs of the ladder.
        config: options with `skip_top`.

    Raises:
        ValueError: no rung is left.
    """
    if not 0 <= config.skip_top < rungs:
        raise ValueError(f"skip_top must leave a rung of the ladder of {rungs}, got {config.skip_top}.")
