"""One batch: rows joined, one call of `generate`, and every word told to whom it belongs."""

from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .. import ZoomReport
from ..asking.session import Session
from .jobs import Job
from .rows import join_rows
from .sampling import RowSampler


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    ends = config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


class RowWatcher(StoppingCriteria):
    """Hands every new token to its job, and ends the rows that are complete or that nobody waits for.

    Args:
        jobs: the batch's requests, in order; each has as many rows as answers.
        reports: one for each request, filled before the first token.
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, jobs: list[Job], reports: list[ZoomReport], ends: frozenset[int]) -> None:
        self._rows = [(place, index) for place, job in enumerate(jobs) for index in range(len(job.choices))]
        self._jobs, self._reports, self._ends = jobs, reports, ends
        self._done = [False] * len(self._rows)

    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) True for the rows that have ended."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            place, index = self._rows[row]
            job = self._jobs[place]
            if job.closed:
                self._done[row] = True
            elif not self._done[row]:
                self._done[row] = job.push(index, token, self._ends)
                if self._done[row] and job.is_complete():
                    job.finish(self._reports[place])
        return torch.tensor(self._done, device=input_ids.device)


def run_batch(session: Session, jobs: list[Job]) -> None:
    """Answers requests whose rows share their key; every job is told its words and its end.

    Args:
        session: the model.
        jobs: one or more.

    Raises:
        Exception: whatever the model raises; jobs that are not closed have got no end then.
    """
    model, rows = session.model, [job.row for job in jobs]
    draws = [draw for row in rows for draw in row.draws]
    for job in jobs:
        job.begin(len(draws))
    reports: list[ZoomReport] = []
    options: dict[str, Any] = {}
    if any(draw.temperature > 0 for draw in draws) or len(rows[0].draws) > 1:
        # generate repeats its rows only where it draws; the sampler leaves it one word to draw from
        options = {"do_sample": True}
        options["logits_processor"] = LogitsProcessorList([RowSampler(draws, session.device)])
    watcher = RowWatcher(jobs, reports, end_tokens(model.generation_config))
    model.generate(
        **join_rows(session, rows),
        **{"do_sample": False, **options},
        **vars(rows[0].options),
        num_beams=1,
        num_return_sequences=len(rows[0].draws),
        max_new_tokens=max(row.max_new_tokens for row in rows),
        pad_token_id=session.processor.tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([watcher]),
        zoom_reports=reports,
    )
    for job, report in zip(jobs, reports, strict=True):
        if not job.closed:  # something of the checkpoint's generation config ended the batch, such as max_time
            job.cut_short()
            job.finish(report)
