"""From labels back to the rows they were made from: training reads the images again instead of copying them."""

import dataclasses
from pathlib import Path
from typing import Any

from .data import Row, load_rows
from .shards import read_manifest
from .stage_configs import DataConfig


def data_settings(config: DataConfig) -> dict[str, Any]:
    """What a labelling stage has among its manifest's settings, so that its rows are found again."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(DataConfig)}


def labelled_rows(folder: str | Path, stage: str) -> dict[str, Row]:
    """The rows that a folder of labels was made from, by id.

    Raises:
        ValueError: The folder holds no finished labels of this stage, or its data is gone or has changed.
    """
    manifest = read_manifest(folder, stage)
    names = [field.name for field in dataclasses.fields(DataConfig)]
    source = DataConfig(**{name: manifest["settings"][name] for name in names})
    rows = load_rows(source)
    if rows.fingerprint != manifest["rows"]:
        raise ValueError(
            f"labels={folder} were made from {source.data}, whose rows have changed since; run {stage!r} again into "
            "another folder, or bring the old data back."
        )
    return {row.id: row for row in rows}
