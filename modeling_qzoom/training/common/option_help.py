"""What `--help` says about a stage's options: name, type, default (as YAML has it) and help of each."""

import dataclasses
import inspect
import json
import textwrap
import typing

from .config_files import REQUIRED


_WIDTH = 100


def _type_name(kind: object) -> str:
    """A type as Python writes it, without the module it comes from."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _default(field: dataclasses.Field[object]) -> object:
    return field.default_factory() if callable(field.default_factory) else field.default


def _lines(kind: type, names: typing.Iterable[str], prefix: str = "", instance: object = None) -> list[str]:
    """Lines about some fields of a dataclass; fields of a nested one follow with a dot in their names.

    Args:
        instance: values that win over the dataclass's own defaults, for a nested one.
    """
    hints = typing.get_type_hints(kind)
    lines: list[str] = []
    for field in dataclasses.fields(kind):
        if field.name not in names:
            continue
        default = _default(field) if instance is None else getattr(instance, field.name)
        help_text = textwrap.wrap(field.metadata.get("help", ""), _WIDTH - 6)
        if dataclasses.is_dataclass(hints[field.name]):
            lines += [f"  {prefix}{field.name}: {' '.join(help_text)}"]
            nested = typing.cast(type, hints[field.name])
            inner = [entry.name for entry in dataclasses.fields(nested)]
            lines += _lines(nested, inner, f"{prefix}{field.name}.", default)
            continue
        state = f"default {json.dumps(default, ensure_ascii=False)}"
        if field.name in REQUIRED and default == "":
            state = "required"
        lines.append(f"  {prefix}{field.name}: {_type_name(hints[field.name])}, {state}")
        lines += [f"      {line}" for line in help_text]
    return lines


def describe_options(kind: type) -> str:
    """All options of a stage, its own first, then those of the groups it shares with other stages.

    Args:
        kind: dataclass of the stage's options.
    """
    parts = []
    shown: set[str] = set()
    for group in kind.__mro__:
        names = [name for name in inspect.get_annotations(group) if name not in shown]
        shown.update(names)
        if dataclasses.is_dataclass(group) and names:
            title = (group.__doc__ or "").split("\n")[0]
            parts.append("\n".join([title, *_lines(group, names)]))
    return "\n\n".join(parts) + "\n"
