"""From what each configuration answers to the one that a router should choose.

The cheapest configuration that is right where the largest one is. Of several that cost the same, the first one named.
Rows that the largest one gets wrong teach nothing, or that they are not worth more than the cheapest: an option.
"""

import logging
from collections import Counter
from collections.abc import Sequence

from ...visor_configurations_qzoom import READ, SELF
from .route_record import RouteRecord


logger = logging.getLogger(__name__)


def cost_order(letters: str) -> tuple[int, int]:
    """What configurations are compared by: the layers that update visual tokens, then those that only read them."""
    return letters.count(SELF), letters.count(READ)


def route_of(right: Sequence[bool], letters: Sequence[str], wrong: str) -> int | None:
    """Place of the configuration that a row should have; None where it teaches nothing.

    Args:
        right: whether each configuration is right.
        letters: the configurations, one letter a layer.
        wrong: "drop" or "cheapest", for a row that the largest one gets wrong.
    """
    order = sorted(range(len(letters)), key=lambda place: cost_order(letters[place]))
    costs = [cost_order(kinds) for kinds in letters]
    largest = costs.index(max(costs))
    if not right[largest]:
        return order[0] if wrong == "cheapest" else None
    return next(place for place in order if right[place])


def select_routes(
    records: Sequence[RouteRecord], choices: Sequence[str], letters: Sequence[str], wrong: str
) -> list[tuple[RouteRecord, int]]:
    """The rows to train on and the place of each one's choice, in the records' order; counts them by choice.

    Args:
        records: labels of `label-routes`.
        choices: the router's configurations.
        letters: what they do in this checkpoint.
        wrong: as for `route_of`.

    Raises:
        ValueError: the labels lack a choice or know another one by its name, or say the same for every row.
    """
    routes = []
    for record in records:
        asked = dict(zip(record.configurations, zip(record.letters, record.right)))
        for name, kinds in zip(choices, letters):
            if name not in asked:
                raise ValueError(
                    f"the labels do not tell what {name!r} answers, only {list(asked)}: set choices to some of these, "
                    "or run label-routes with it."
                )
            if asked[name][0] != kinds:
                raise ValueError(
                    f"the labels were made with {name!r} as {asked[name][0]}, which is {kinds} in this checkpoint: "
                    "run label-routes again into another folder."
                )
        route = route_of([asked[name][1] for name in choices], letters, wrong)
        if route is not None:
            routes.append((record, route))
    counts = Counter(choices[route] for _, route in routes)
    for name in choices:
        logger.info("%s: the choice of %d rows", name, counts[name])
    logger.info("%d of %d rows dropped: the largest configuration is wrong", len(records) - len(routes), len(records))
    if len(counts) < 2:
        raise ValueError(
            f"a router needs rows with different choices; here {dict(counts)} is all there is. Take other data, other "
            "choices, or ask for one configuration without a router."
        )
    return routes
