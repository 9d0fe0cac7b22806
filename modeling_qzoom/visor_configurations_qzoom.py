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
DENSE, AUTO = "dense", "auto"
_RESERVED = (DENSE, AUTO)


def check_visor(visor: Any, layers: int) -> None:
    """Checks the VISOR part of a configuration.

    Args:
        visor: `{"configurations": {name: letters}}`, with `"router": {"layer": …, "choices": [names]}` where there is
            one; or None.
        layers: number of decoder layers.

    Raises:
        CheckpointError: names what does not hold.
    """
    if visor is None:
        return
    known = {"configurations", "router"}
    if not isinstance(visor, dict) or set(visor) - known or not isinstance(visor.get("configurations"), dict):
        raise CheckpointError(
            "visor must be {'configurations': {name: letters}}, with a 'router' where there is one, or None, got "
            f"{shown(visor)}."
        )
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


def check_router(visor: dict[str, Any] | None, layers: int) -> None:
    """Checks the router of a configuration that `check_visor` has passed.

    Raises:
        CheckpointError: names what does not hold.
    """
    router = None if visor is None else visor.get("router")
    if visor is None or router is None:
        return
    if not isinstance(router, dict) or set(router) != {"layer", "choices"}:
        raise CheckpointError(f"visor: router must be {{'layer': …, 'choices': [names]}}, got {shown(router)}.")
    choices, layer = router["choices"], router["layer"]
    known = [DENSE, *visor["configurations"]]
    if not isinstance(choices, list) or len(choices) < 2 or len(set(choices)) < len(choices):
        raise CheckpointError(f"visor: a router needs two or more different choices, got {shown(choices)}.")
    foreign = [name for name in choices if name not in known]
    if foreign:
        raise CheckpointError(
            f"visor: the router's choice {shown(foreign[0])} is no configuration; there are {known}."
        )
    shared = shared_layers([visor["configurations"].get(name) or SELF * layers for name in choices])
    if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer <= shared:
        raise CheckpointError(
            f"visor: the router stands in front of layer {shown(layer)}, but its choices share the first {shared} "
            "layers, and it needs one at least to have seen the image. Choose a layer from 1 on among them."
        )


def shared_layers(kinds: Sequence[str]) -> int:
    """Number of first layers that are of the same kind in all of them."""
    return next((index for index, letters in enumerate(zip(*kinds)) if len(set(letters)) > 1), len(kinds[0]))


def layer_kinds(visor: dict[str, Any] | None, name: str) -> str | None:
    """The letters of a configuration; None for the plain model.

    Raises:
        InputError: the checkpoint has no such configuration; or no router, for "auto".
    """
    if name == DENSE:
        return None
    known = {} if visor is None else visor["configurations"]
    if name == AUTO:
        raise InputError("vision='auto' needs a checkpoint with a router, which this one does not have.")
    if name not in known:
        raise InputError(f"vision={shown(name)} is not a configuration of this checkpoint; it has {[DENSE, *known]}.")
    return known[name]


def is_routed(visor: dict[str, Any] | None, name: str) -> bool:
    """Whether a router chooses the configuration."""
    return name == AUTO and visor is not None and visor.get("router") is not None


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
