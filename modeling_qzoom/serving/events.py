"""What passes between whoever takes a request and whoever answers it; plain data, so that it can leave the process."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import Failure


@dataclass(frozen=True)
class Sampling:
    """How the words of an answer are chosen.

    Attributes:
        temperature: 0 for the most probable word; None as the checkpoint says.
        top_p: share of probability that words are drawn from; None as the checkpoint says.
        seed: makes the draw repeatable; choice i of several draws with seed + i.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A checked request.

    Attributes:
        messages: role and parts of each; a part is {"type": "text", "text": str} or {"type": "image", "image": bytes},
            an encoded image.
        choices: number of answers.
        max_new_tokens: longest answer, None for the server's limit.
        stop: texts that end an answer; they are not part of it.
        sampling: how words are chosen.
        zoom: zoom options of `generate` by name, `effort` included.
        budget: `min_tokens` and `max_tokens` of the coarse view, where given.
        report: whether zoom reports are asked for.
        overlay: whether they come with a picture.
        stream: whether words are wanted as they come.
    """

    messages: list[dict[str, Any]]
    choices: int = 1
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    zoom: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, int] = field(default_factory=dict)
    report: bool = False
    overlay: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Begun:
    """The batch that the request belongs to runs.

    Attributes:
        queue_seconds: how long the request waited, its preparation included.
        batch_rows: answers that the batch makes together.
    """

    queue_seconds: float
    batch_rows: int


@dataclass(frozen=True)
class Words:
    """The next words of one choice."""

    choice: int
    text: str


@dataclass(frozen=True)
class Choice:
    """One whole answer; `finish_reason` is "stop" or "length"."""

    text: str
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Answered:
    """The end of a request that went well.

    Attributes:
        choices: the answers.
        prompt_tokens: tokens of the prompt, those of the coarse images included.
        coarse_tokens: visual tokens of the prompt.
        crop_tokens: visual tokens of the crop.
        reason: what zooming did, as in `ZoomReport.reason`.
        report: `ZoomReport.to_dict()` with the options in force, where it was asked for.
        first_token_seconds: from the begin of the batch to the first word.
        step_seconds: mean time of a later word; None for answers of one word.
    """

    choices: list[Choice]
    prompt_tokens: int
    coarse_tokens: int
    crop_tokens: int
    reason: str
    report: dict[str, Any] | None
    first_token_seconds: float
    step_seconds: float | None


Event = Begun | Words | Answered | Failure


class Engine(Protocol):
    """Whoever answers prompts: a model in this process, replicas elsewhere, or another server."""

    def answer(self, prompt: Prompt) -> AsyncIterator[Event]:
        """Events of one request: `Begun`, for streams `Words`, and in the end `Answered` or `Failure`.

        Closing the iterator gives the request up.
        """

    async def check(self) -> None:
        """Returns where requests can be answered.

        Raises:
            RequestFailed: they cannot, at present.
        """
