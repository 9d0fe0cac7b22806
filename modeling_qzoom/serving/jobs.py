"""A request on its way through a worker: its prepared row, its growing answers, and who is told of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import ZoomReport
from .errors import Failure
from .events import Answered, Begun, Choice, Event, Prompt, Words
from .rows import Row
from .texts import GrowingText


LENGTH, STOP = "length", "stop"


@dataclass
class GrowingChoice:
    """One answer of a request while it grows."""

    text: GrowingText
    tokens: int = 0
    finish_reason: str | None = None


class Job:
    """A request between its admission and its end.

    The thread that generates calls everything but `close`, which whoever waits for the answer calls to give it up.

    Args:
        prompt: the request.
        row: the same as the model takes it.
        tokenizer: decodes the answers.
        tell: takes the events; may be called from any thread.
        arrived: `time.monotonic()` of the request's arrival.
    """

    def __init__(
        self, prompt: Prompt, row: Row, tokenizer: Any, tell: Callable[[Event], None], arrived: float
    ) -> None:
        self.prompt, self.row, self._tell, self._arrived = prompt, row, tell, arrived
        self.queued = time.monotonic()
        self.closed = False
        self.choices = [GrowingChoice(GrowingText(tokenizer, prompt.stop)) for _ in range(prompt.choices)]
        self.report: ZoomReport | None = None
        self._began = self._first = 0.0

    @property
    def has_spoken(self) -> bool:
        """Whether a word was made, so that the request cannot be answered anew without saying it twice."""
        return self._first > 0.0

    def close(self) -> None:
        """Gives the request up: nothing more is told, and its rows are left to end."""
        self.closed = True

    def begin(self, batch_rows: int) -> None:
        """Tells that the batch runs."""
        self._began = time.monotonic()
        self._send(Begun(self._began - self._arrived, batch_rows))

    def push(self, index: int, token: int, ends: frozenset[int]) -> bool:
        """Adds a token to one answer.

        Args:
            ends: ids of the tokens that end an answer.

        Returns:
            Whether the answer is complete.
        """
        if self._first == 0.0:
            self._first = time.monotonic()
        choice = self.choices[index]
        choice.tokens += 1
        words = "" if token in ends else choice.text.push(token)
        if token in ends or choice.text.stopped:
            choice.finish_reason = STOP
        elif choice.tokens >= self.row.max_new_tokens:
            choice.finish_reason = LENGTH
        if choice.finish_reason is not None:
            words += choice.text.close()
            if choice.text.stopped:  # in what was held back
                choice.finish_reason = STOP
        if words and self.prompt.stream:
            self._send(Words(index, words))
        return choice.finish_reason is not None

    def cut_short(self) -> None:
        """Ends the answers that are not complete."""
        for index, choice in enumerate(self.choices):
            if choice.finish_reason is None:
                words = choice.text.close()
                choice.finish_reason = STOP if choice.text.stopped else LENGTH
                if words and self.prompt.stream:
                    self._send(Words(index, words))

    def is_complete(self) -> bool:
        """Whether all answers have ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    def finish(self, report: ZoomReport) -> None:
        """Tells the answers.

        Args:
            report: what zooming did to the row; kept as `report`.
        """
        self.report = report
        longest = max(choice.tokens for choice in self.choices)
        steps = (time.monotonic() - self._first) / (longest - 1) if longest > 1 else None
        answers = [Choice(each.text.text, each.finish_reason or LENGTH, each.tokens) for each in self.choices]
        self._send(
            Answered(
                choices=answers,
                prompt_tokens=self.row.prompt_tokens,
                coarse_tokens=report.coarse_tokens,
                crop_tokens=report.crop_tokens,
                reason=report.reason,
                report=None,
                first_token_seconds=self._first - self._began,
                step_seconds=steps,
            )
        )
        self.closed = True

    def fail(self, failure: Failure) -> None:
        """Tells why there is no answer."""
        self._send(failure)
        self.closed = True

    def _send(self, event: Event) -> None:
        if not self.closed:
            self._tell(event)
