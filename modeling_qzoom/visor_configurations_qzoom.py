"""VISOR: which decoder layers visual tokens take part in, and how; named configurations of a checkpoint.

One letter a layer:

    S  self-attention: visual and text tokens are updated
    R  reading: visual tokens stay as they are, text reads their keys and values through the layer's own weights
    T  text only: visual tokens are absent

`SSSSRR` is a decoder of six layers whose visual tokens are updated in the first four and read in all. `dense` is the
plain model; every checkpoint has it.
"""

from collections.abc import Sequence
from typing import Any

from .errors_qzoom import CheckpointError, InputError
from .messages_qzoom import shown


SELF, READ, TEXT = "S", "R", "T"
DENSE = "dense"
_RESERVED = (DENSE, "auto")


def check_visor(visor: Any, layers: int) -> None:
    """Checks the VISOR part of a configuration.

    Args:
        visor: `{"configurations": {name: letters}}`, or None.
        layers: number of decoder layers.

    Raises:
        CheckpointError: names what does not hold.
    """
    if visor is None:
        return
    if (
        not isinstance(visor, dict)
        or set(visor) != {"configurations"}
        or not isinstance(visor["configurations"], dict)
    ):
        raise CheckpointError(f"visor must be {{'configurations': {{name: letters}}}} or None, got {shown(visor)}.")
    for name, kinds in visor["configurations"].items():
        if not isinstance(name, str) or not name or name in _RESERVED:
            raise CheckpointError(
                f"visor: a configuration needs a name other than {list(_RESERVED)}, got {shown(name)}."
            )
        if not isinstance(kinds, str) or set(kinds) - {SELF, READ, TEXT}:
            raise CheckpointError(
                f"visor: configuration {name!r} must be one letter a decoder layer, S (self-attention), R (reading) "
                f"or T (text only), got {shown(kinds)}."
            )
        if len(kinds) != layers:
            raise CheckpointError(
                f"visor: configuration {name!r} names {len(kinds)} layers, the VLM's decoder has {layers}."
            )


def layer_kinds(visor: dict[str, Any] | None, name: str) -> str | None:
    """The letters of a configuration; None for the plain model.

    Raises:
        InputError: the checkpoint has no such configuration.
    """
    if name == DENSE:
        return None
    known = {} if visor is None else visor["configurations"]
    if name not in known:
        raise InputError(f"vision={shown(name)} is not a configuration of this checkpoint; it has {[DENSE, *known]}.")
    return known[name]


def by_row(vision: str | Sequence[str], rows: int) -> list[str]:
    """The configuration of every row.

    Raises:
        InputError: a list of another length, or something that is no name.
    """
    names = [vision] * rows if isinstance(vision, str) else list(vision)
    if len(names) != rows:
        raise InputError(f"vision names the configurations of {len(names)} rows, the batch has {rows}.")
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"vision must be a name, or one name a row, got {shown(name)}.")
    return names
