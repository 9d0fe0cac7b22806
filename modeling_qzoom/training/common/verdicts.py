"""Which of several replies to each row are right."""

from collections.abc import Sequence

from ...asking.judges import Judge
from ...data.rows import Row


def verdicts(
    judge: Judge, rows: Sequence[Row], truths: Sequence[tuple[str, ...]], replies: list[list[str]]
) -> list[list[bool]]:
    """Whether each reply to each row is right; a reply that occurs twice is judged once, an empty one is wrong.

    Args:
        judge: who decides.
        rows: rows that were asked about.
        truths: accepted answers per row; a row without a truth that says something gets no reply right.
        replies: replies per row, as many for each.
    """
    right: dict[tuple[int, str], bool] = {}
    for number, (accepted, row_replies) in enumerate(zip(truths, replies, strict=True)):
        for reply in row_replies:
            if reply and any(truth.strip() for truth in accepted):
                right[number, reply] = False
    keys = list(right)
    if keys:
        decisions = judge.judge(
            [rows[number].question for number, _ in keys],
            [truths[number] for number, _ in keys],
            [reply for _, reply in keys],
        )
        right.update(zip(keys, decisions, strict=True))
    return [[right.get((number, reply), False) for reply in texts] for number, texts in enumerate(replies)]
