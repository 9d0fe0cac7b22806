"""What error messages have in common: values as they are quoted, and the name that was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor


_LONGEST_VALUE = 80  # characters of a refused value that a message quotes
_CLOSE_MISS = 0.85  # share of equal characters; "max_tokens" and "crop_max_tokens" share 0.82


def shown(value: Any) -> str:
    """A refused value as a message quotes it, cut where it is long; a text keeps its end, where a file's name is."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return f"a number of more than {_LONGEST_VALUE} digits"
    if len(text) <= _LONGEST_VALUE:
        return text
    half = _LONGEST_VALUE // 2
    return f"{text[:half]}…{text[-half:]}" if isinstance(value, str) else f"{text[:_LONGEST_VALUE]}…"


def described(value: Any) -> str:
    """A refused value by its type, a tensor also by its shape."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def one_line(error: Exception) -> str:
    """What another library's error says, without its line breaks."""
    return " ".join(str(error).split())


def similar(name: str, known: Iterable[str], likeness: float, count: int = 1) -> list[str]:
    """The known names that a name resembles, closest first.

    Args:
        name: name to look up; capitals do not matter.
        known: names that exist.
        likeness: smallest share of equal characters, 0 to 1.
        count: largest number of names to return.
    """
    return difflib.get_close_matches(name.lower(), sorted(known), n=count, cutoff=likeness)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def close_miss(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that a name was probably meant to be; None for a name of somebody else's.

    Caught are other spellings, one or two wrong or swapped letters, and names that are cut short or go on.
    """
    plain = _plain(name)
    for option in known:
        plain_option = _plain(option)
        begins = min(len(name.split("_")), len(option.split("_"))) > 1 and (
            f"{option}_".startswith(f"{name.lower()}_") or f"{name.lower()}_".startswith(f"{option}_")
        )
        swapped = sorted(plain) == sorted(plain_option)
        if swapped or begins or difflib.SequenceMatcher(None, plain, plain_option).ratio() >= _CLOSE_MISS:
            return option
    return None
