"""`train-router`: the router learns the cheapest configuration that answers as rightly as the largest one.

Its weights alone are trained, by cross-entropy; layers above its own do not run.
"""

from collections.abc import Sequence
from typing import Any

from ... import QZoomForConditionalGeneration
from ...asking.session import Session
from ...visor_configurations_qzoom import shared_layers
from ..common.fresh_branches import reset_router
from ..common.labelled import Labelled
from ..common.run import train
from ..common.stage import LabelledStage, Parts
from .config import TrainRouterConfig
from .configurations import chosen_configurations, letters_of
from .route_record import RouteRecord
from .route_rule import select_routes
from .route_samples import RouteDataset, collate_routes


def router_of(config: TrainRouterConfig, model: QZoomForConditionalGeneration) -> dict[str, Any]:
    """Layer and choices of the router that is to be trained, as `QZoomConfig.visor` has them.

    Raises:
        ValueError: the checkpoint lacks a choice, or has no configurations; or a router that is to be kept is missing
            or another one than the options ask for.
    """
    own = (model.config.visor or {}).get("router")
    names = own["choices"] if config.choices is None and own is not None else config.choices
    choices = chosen_configurations(model.config, names)
    layer = config.layer
    if layer is None and own is not None and own["choices"] == choices:
        layer = own["layer"]
    elif layer is None:
        layer = shared_layers(letters_of(model.config, choices))
    router = {"layer": layer, "choices": choices}
    if not config.reset and own != router:
        raise ValueError(
            f"reset=false goes on with the checkpoint's router, which is {own}, not {router}: set reset=true to start "
            "a fresh one, or leave layer and choices out."
        )
    return router


class RouterStage(LabelledStage[TrainRouterConfig, RouteRecord]):
    """The router on the labels of `label-routes`."""

    name, labels = "train-router", "label-routes"

    def record(self, row: dict[str, Any]) -> RouteRecord:
        return RouteRecord.from_row(row)

    def dataset(self, labelled: Labelled[RouteRecord]) -> RouteDataset:
        session = labelled.session
        choices = router_of(self.config, session.model)["choices"]
        letters = letters_of(session.model.config, choices)
        routes = select_routes(labelled.records, choices, letters, self.config.wrong)
        return RouteDataset(session, routes, labelled.rows)

    def parts(self, session: Session) -> Parts:
        router = router_of(self.config, session.model)
        if self.config.reset:
            reset_router(session.model, router)
        assert session.model.visor is not None
        return [session.model.visor.router]

    def collate(self, items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
        return collate_routes(items, pad_token_id)


def run(config: TrainRouterConfig) -> None:
    """Train the router on the labels of `label-routes`, and write the checkpoint to `config.output`.

    Raises:
        ValueError: labels, configurations, model or options do not fit.
    """
    train(RouterStage(config))
