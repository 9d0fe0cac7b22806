"""Reads a stage's configuration from YAML and from overrides on the command line, and checks names and types."""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

from ...data.extras import needed_for


Config = TypeVar("Config")

# options that every stage which has them needs
REQUIRED = ("model", "data", "labels", "output")


def _number_of_text(value: Any) -> Any:
    """YAML reads 1e-4 as text; as a number where it is one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _convert(value: Any, kind: Any, name: str) -> Any:
    """A YAML value as a field's type wants it.

    Raises:
        ValueError: It is of another type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _number_of_text(value)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), name)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build_config(kind, value, name + ".")
    if origin is dict and isinstance(value, dict):
        return {_convert(k, args[0], name): _convert(v, args[1], f"{name}.{k}") for k, v in value.items()}
    if origin is list and isinstance(value, list):
        return [_convert(item, args[0], name) for item in value]
    plain = origin or kind
    if plain is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if plain is int and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,18}", value):
        return int(value)
    if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be of type {getattr(kind, '__name__', kind)}, got {value!r}.")


def build_config(kind: type[Config], values: Any, prefix: str = "") -> Config:
    """A configuration from nested mappings.

    Raises:
        ValueError: An unknown name (the closest known one is offered) or a value of a wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'The configuration'} must be a mapping of names to values.")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {sorted(hints)}."
            raise ValueError(f"There is no option {prefix}{name}; {hint}")
    return kind(**{name: _convert(value, hints[name], prefix + name) for name, value in values.items()})


def _parse_yaml(text: str, name: str) -> Any:
    """What a YAML text says.

    Args:
        name: What the text is, as the beginning of an error's sentence.

    Raises:
        ValueError: It is no YAML.
        ImportError: PyYAML is missing; the extra `stages` installs it.
    """
    with needed_for("Training configurations need PyYAML"):
        import yaml
    try:
        return yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: a date that is none, such as 2024-13-01
        raise ValueError(f"{name} is no YAML: {error}") from error


def read_yaml(path: str | Path) -> Any:
    """The contents of a YAML file.

    Raises:
        ValueError: It does not exist or is no YAML.
        ImportError: PyYAML is missing; the extra `stages` installs it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {path} cannot be read: {error}.") from error
    return _parse_yaml(text, f"The configuration {path}")


def load_config(kind: type[Config], path: str | Path | None, overrides: list[str]) -> Config:
    """A stage's configuration from a file and `name=value` overrides; values are YAML, names may have dots.

    Raises:
        ValueError: A file or an override that does not fit.
    """
    values = {} if path is None else read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"The configuration {path} must be a mapping of names to values.")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"An override has the form name=value, got {override!r}.")
        *parents, last = name.lstrip("-").split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {parent} holds a value, not options.")
        place[last] = _parse_yaml(text, f"The value of {name}={text}")
    config = build_config(kind, values)
    for name in REQUIRED:
        if getattr(config, name, None) == "":
            raise ValueError(f"The configuration lacks {name!r}; set it in the file or as {name}=….")
    return config
