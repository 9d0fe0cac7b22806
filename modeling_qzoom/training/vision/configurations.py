"""VISOR's configurations as the stages' options name them, and which of them a step trains under."""

import random
from collections.abc import Sequence

from ... import QZoomConfig
from ...visor_configurations_qzoom import DENSE, SELF, layer_kinds


def add_configurations(config: QZoomConfig, added: dict[str, str]) -> None:
    """Write configurations into a model's, which keeps those that it has.

    Raises:
        ValueError: one is malformed, of another number of layers, or differs from the model's own of that name.
    """
    visor = config.visor or {"configurations": {}}
    for name, kinds in added.items():
        own = visor["configurations"].get(name, kinds)
        if own != kinds:
            raise ValueError(
                f"add_configurations: {name!r} is {own} in this checkpoint, not {kinds}; give yours another name."
            )
    if added:
        config.visor = {**visor, "configurations": {**visor["configurations"], **added}}
        config.check_fields()


def chosen_configurations(config: QZoomConfig, names: Sequence[str] | None) -> list[str]:
    """The names to work with: those that are given, or the plain model and all of the checkpoint's by alphabet.

    Raises:
        ValueError: the checkpoint lacks one, or has none at all.
    """
    if names is None:
        # a configuration's file is written by alphabet, so that no other order is the same after loading
        names = [DENSE, *sorted((config.visor or {"configurations": {}})["configurations"])]
        if len(names) == 1:
            raise ValueError(
                "this checkpoint has no configurations of VISOR; write some into it with add_configurations of "
                "train-vision."
            )
    for name in names:
        layer_kinds(config.visor, name)
    return list(names)


def letters_of(config: QZoomConfig, names: Sequence[str]) -> list[str]:
    """The letters of configurations, one a decoder layer; those of the plain model are all S."""
    layers = config.get_text_config().num_hidden_layers
    return [layer_kinds(config.visor, name) or SELF * layers for name in names]


def configuration_at(names: Sequence[str], seed: int, step: int) -> str:
    """The configuration of an optimiser's step: each name once in every `len(names)` steps, in an order that is drawn.

    It depends on its arguments alone, so all processes, and a run that was stopped and goes on, have the same.
    """
    turn, place = divmod(step, len(names))
    return random.Random(f"configurations/{seed}/{turn}").sample(list(names), len(names))[place]
