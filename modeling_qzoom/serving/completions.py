"""Answers in the form of OpenAI's API, whole and in pieces."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from .errors import Failure
from .events import Answered, Words


@dataclass(frozen=True)
class Completion:
    """What all pieces of one answer have in common.

    Attributes:
        model: name of the model.
        include_usage: whether a stream ends with the tokens that it took.
    """

    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def whole(self, answered: Answered) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(answered.choices)
        ]
        return self._object("chat.completion", choices, usage=usage(answered), **_reports(answered))

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage_of_others = {"usage": None} if self.include_usage and "usage" not in more else {}
        return event_line(self._object("chat.completion.chunk", choices, **usage_of_others, **more))

    def _delta(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk([choice])

    def opening(self, choices: int) -> bytes:
        """The first pieces of a stream: who speaks, for every choice."""
        return b"".join(self._delta(index, {"role": "assistant", "content": ""}) for index in range(choices))

    def words(self, words: Words) -> bytes:
        """A piece with words."""
        return self._delta(words.choice, {"content": words.text})

    def closing(self, answered: Answered) -> bytes:
        """The last pieces: why each choice ended, reports and usage where they were asked for, and the end mark."""
        ends = [self._delta(index, {}, choice.finish_reason) for index, choice in enumerate(answered.choices)]
        more = _reports(answered)
        if self.include_usage:
            more["usage"] = usage(answered)
        if more:
            ends.append(self._chunk([], **more))
        return b"".join(ends) + b"data: [DONE]\n\n"


def event_line(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def broken_off(failure: Failure) -> bytes:
    """The last event of a stream that cannot go on; there is no end mark behind it."""
    return event_line(failure.body())


def usage(answered: Answered) -> dict[str, Any]:
    """Tokens of an answer. A crop's tokens are part of the prompt, which is counted once however many choices."""
    prompt = answered.prompt_tokens + answered.crop_tokens
    new = sum(choice.tokens for choice in answered.choices)
    visual = {"visual_tokens": answered.coarse_tokens + answered.crop_tokens, "crop_tokens": answered.crop_tokens}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": visual,
    }


def _reports(answered: Answered) -> dict[str, Any]:
    if answered.report is None:
        return {}
    return {"zoom_reports": [{"choice": index, **answered.report} for index in range(len(answered.choices))]}
