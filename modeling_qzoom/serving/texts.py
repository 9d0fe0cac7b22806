"""The text of one answer while it grows: whole characters only, and nothing of a text that ends it."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of a text with which one of `stop` may begin."""
    longest = min(len(text), max((len(entry) - 1 for entry in stop), default=0))
    for length in range(longest, 0, -1):
        if any(entry.startswith(text[-length:]) for entry in stop):
            return length
    return 0


class GrowingText:
    """The text of one answer.

    Args:
        tokenizer: a fast tokenizer.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""  # whole characters so far
        self._told = 0  # how much of it was handed out
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything that was handed out."""
        return self._decoded[: self._told]

    def push(self, token: int) -> str:
        """Adds a token.

        Returns:
            The words that are certain now. `stopped` is True once a text of `stop` has come.
        """
        self._ids.append(token)
        return self._add(self._stream.step(self._tokenizer.backend_tokenizer, token) or "", is_end=False)

    def close(self) -> str:
        """Ends the answer; returns what was held back."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        return self._add(rest, is_end=True)

    def _add(self, new: str, is_end: bool) -> str:
        if self.stopped:
            return ""
        begin = self._told
        self._decoded += new
        places = [place for entry in self._stop if (place := self._decoded.find(entry, begin)) >= 0]
        if places:
            self.stopped, end = True, min(places)
        else:
            end = len(self._decoded) - (0 if is_end else _held_back(self._decoded[begin:], self._stop))
        self._told = end
        return self._decoded[begin:end]
