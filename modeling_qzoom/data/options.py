"""Options of commands: fields of dataclasses that carry their own help."""

import argparse
import copy
from collections.abc import Callable
from dataclasses import field
from typing import TypeVar


Value = TypeVar("Value")


def option(default: Value, help: str) -> Value:
    """A field of a dataclass of options; to a type checker it is the field's default.

    Args:
        default: value of the option where nobody sets it; each instance gets a copy of a list, a table or options.
        help: what the option does, for `--help`.
    """
    if getattr(default, "__hash__", None) is not None:
        return field(default=default, metadata={"help": help})
    return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})


def check_positive(options: object, *names: str) -> None:
    """Check options that count something.

    Args:
        options: dataclass that holds them.
        names: names of the options.

    Raises:
        ValueError: an option is below 1; names it.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}.")


def whole_number(least: int) -> Callable[[str], int]:
    """A parser of an argument that is a whole number from `least` on."""

    def parse(text: str) -> int:
        number = int(text) if text.strip().lstrip("+-").isdigit() else least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return parse
