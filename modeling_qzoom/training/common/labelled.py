"""What training begins with: labels, the rows they were made from, and the model that is to be trained on them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session
from ...data.config import DataConfig
from ...data.readers import load_rows
from ...data.rows import Row
from .config import TrainConfig
from .label_store import labels_of, read_manifest


Record = TypeVar("Record")


def labelled_rows(folder: str | Path, manifest: dict[str, Any]) -> dict[str, Row]:
    """The rows that a folder of labels was made from, by id: training reads images again instead of copying them.

    Args:
        folder: folder of the labels, for the error's sentence.
        manifest: what they were made from.

    Raises:
        ValueError: the data is gone or has changed.
    """
    source = DataConfig(**{field.name: manifest["settings"][field.name] for field in fields(DataConfig)})
    rows = load_rows(source)
    if rows.fingerprint != manifest["rows"]:
        raise ValueError(
            f"labels={folder} were made from {source.data}, whose rows have changed since; run {manifest['stage']!r} "
            "again into another folder, or bring the old data back."
        )
    return {row.id: row for row in rows}


@dataclass(frozen=True)
class Labelled(Generic[Record]):
    """Labels, and what they are about.

    Attributes:
        records: labels in order.
        rows: rows that they were made from, by id.
        session: model that is to be trained on them.
        backbone: fingerprint of its backbone.
    """

    records: list[Record]
    rows: dict[str, Row]
    session: Session
    backbone: str

    @classmethod
    def open(cls, config: TrainConfig, stage: str, from_row: Callable[[dict[str, Any]], Record]) -> "Labelled[Record]":
        """Read the labels of a configuration and load its model.

        Args:
            config: options of the training stage.
            stage: name of the labelling stage.
            from_row: makes a record of a label by column.

        Raises:
            ValueError: labels, data or model are missing or do not belong together.
        """
        manifest = read_manifest(config.labels, stage)
        rows = labelled_rows(config.labels, manifest)
        session = open_session(config)
        backbone = backbone_fingerprint(session.model)
        labels = labels_of(config.labels, manifest, None if config.other_backbone else backbone)
        return cls([from_row(label) for label in labels], rows, session, backbone)
