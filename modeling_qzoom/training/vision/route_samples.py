"""Samples of `train-router`: a question, and the place of the configuration that it needs."""

from collections.abc import Sequence
from typing import Any

import torch

from ...asking.chats import stack_features
from ...asking.session import Session
from ...data.rows import Row
from ..common.branch_dataset import BranchDataset
from ..common.trainer import Key
from .route_record import RouteRecord


class RouteDataset(BranchDataset):
    """Prompts with their routes.

    Args:
        session: model whose processor makes the inputs.
        routes: records and places among the router's choices, from `select_routes`.
        rows: rows behind the labels, by id.
    """

    def __init__(self, session: Session, routes: list[tuple[RouteRecord, int]], rows: dict[str, Row]) -> None:
        super().__init__(session, rows)
        self.routes = routes

    def __len__(self) -> int:
        return len(self.routes)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Model inputs of one row and its `target`, the same in every epoch."""
        record, target = self.routes[key[1]]
        features = self.coarse_inputs(self.load_image(record.id), [(record.question, None)])
        return {"features": features, "target": target}


def collate_routes(items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """`forward`'s keywords from items of a `RouteDataset`."""
    batch = stack_features([item["features"] for item in items], pad_token_id)
    return {**batch, "route_targets": torch.tensor([item["target"] for item in items])}
