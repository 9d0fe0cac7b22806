"""Shards of labels in a folder: written whole or not at all, each row in exactly one of them.

A manifest says what the labels were made from. Processes share the shards among them.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...data.bad_rows import BadRows
from ...data.config import DataConfig
from ...data.extras import needed_for
from ...data.files import read_json, write_json, written_whole
from ...data.records import read_parquet
from ...data.rows import Row, Rows


logger = logging.getLogger(__name__)


def data_settings(config: DataConfig) -> dict[str, Any]:
    """What a labelling stage has among its manifest's settings, so that its rows are found again."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(DataConfig)}


MANIFEST = "labels.json"
_REMAKE = "delete this file and run its stage again, which makes no other labels anew"


@dataclass(frozen=True)
class Manifest:
    """What a folder of labels was made from.

    Attributes:
        stage: name of the stage.
        backbone: fingerprint of the VLM that made them.
        rows: fingerprint of the rows.
        settings: everything else that the labels depend on.
    """

    stage: str
    backbone: str
    rows: str
    settings: dict[str, Any]


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest as it stands in its file.

    Raises:
        ValueError: the file is damaged.
    """
    way_out = "delete its folder to make the labels anew"
    stored = read_json(path, way_out, [field.name for field in fields(Manifest)] + ["shards"])
    if not isinstance(stored["shards"], int) or not isinstance(stored["settings"], dict):
        raise ValueError(f"{path} is no record of labels; {way_out}.")
    return stored


def _shard_path(folder: Path, number: int, count: int) -> Path:
    return folder / f"labels-{number:05}-of-{count:05}.parquet"


def write_shard(path: Path, records: list[dict[str, Any]], skipped: list[str]) -> None:
    """Write a shard; a reader never sees half of it. Skipped rows are kept in the file's metadata."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(records) if records else pyarrow.table({"id": pyarrow.array([], "string")})
    table = table.replace_schema_metadata({"skipped": json.dumps(skipped)})
    with written_whole(path) as partial:
        parquet.write_table(table, partial)


def _skipped(path: Path) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_schema(path).metadata or {}
        return json.loads(metadata.get(b"skipped", b"[]"))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); {_REMAKE}.") from error


class ShardStore:
    """A folder of label shards.

    Args:
        folder: where they lie; made if it does not exist.
        manifest: what they are made from.
        count: number of shards.

    Raises:
        ValueError: the folder holds labels made from something else.
        ImportError: pyarrow is missing; the extra `stages` installs it.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, count: int) -> None:
        with needed_for("Labels are parquet files, which need pyarrow"):
            import pyarrow  # noqa: F401
        self.folder, self.count = Path(folder), count
        self.folder.mkdir(parents=True, exist_ok=True)
        current = {**vars(manifest), "shards": count}
        path = self.folder / MANIFEST
        if path.exists():
            stored = _read_manifest(path)
            # through JSON, which turns tuples into lists and keys into text
            differing = [key for key, value in json.loads(json.dumps(current)).items() if stored.get(key) != value]
            if differing:
                raise ValueError(
                    f"{self.folder} holds labels whose {', '.join(differing)} differ from what is asked for now; give "
                    "another output folder, or delete this one to make them anew."
                )
        else:
            write_json(path, current)

    def make(
        self,
        rows: Rows,
        shard_size: int,
        label: Callable[[Sequence[Row], BadRows], list[dict[str, Any]]],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Make the shards of this process that do not exist yet.

        Args:
            rows: all rows.
            shard_size: rows per shard.
            label: makes of a shard's rows their labels by column; notes the rows that it cannot use.
            rank: number of this process.
            world: number of processes.
        """
        from tqdm.auto import tqdm

        numbers = range(rank, self.count, world)
        missing = [number for number in numbers if not _shard_path(self.folder, number, self.count).exists()]
        if len(missing) < len(numbers):
            existing = len(numbers) - len(missing)
            logger.info("%s: %d of %d shards exist already", self.folder, existing, len(numbers))
        for number in tqdm(missing, desc=self.folder.name, unit="shard", disable=rank > 0):
            shard = rows[number * shard_size : (number + 1) * shard_size]
            bad = BadRows(self.folder.name)
            records = label(shard, bad)
            write_shard(_shard_path(self.folder, number, self.count), records, bad.skipped)

    def skipped(self) -> list[str]:
        """The rows that could not be used, with reasons."""
        return [
            line for number in range(self.count) for line in _skipped(_shard_path(self.folder, number, self.count))
        ]


def make_labels(
    folder: str | Path,
    manifest: Manifest,
    rows: Rows,
    shard_size: int,
    label: Callable[[Sequence[Row], BadRows], list[dict[str, Any]]],
) -> None:
    """Label rows into a folder, together with the other processes of this run; existing shards are kept.

    Raises:
        ValueError: the folder holds other labels, or more rows were unusable than not.
    """
    from accelerate import PartialState

    # other bounds between shards would lose rows or make them twice
    manifest = replace(manifest, settings={**manifest.settings, "shard_size": shard_size})
    state = PartialState()
    with state.main_process_first():
        store = ShardStore(folder, manifest, -(-len(rows) // shard_size))
    store.make(rows, shard_size, label, state.process_index, state.num_processes)
    state.wait_for_everyone()
    bad = BadRows(str(folder))
    bad.skipped = store.skipped()
    bad.check(len(rows) - len(bad.skipped))


def read_manifest(folder: str | Path, stage: str) -> dict[str, Any]:
    """What a folder of labels was made from.

    Raises:
        ValueError: it holds no labels of this stage, or not all of them yet.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"labels={folder}: there are no labels; make them with the stage {stage!r}.")
    stored = _read_manifest(path)
    if stored["stage"] != stage:
        raise ValueError(
            f"labels={folder}: these are labels of {stored['stage']!r}, this stage needs those of {stage!r}."
        )
    missing = [n for n in range(stored["shards"]) if not _shard_path(Path(folder), n, stored["shards"]).exists()]
    if missing:
        raise ValueError(
            f"labels={folder}: {len(missing)} of {stored['shards']} shards are missing; run {stage!r} again to finish."
        )
    return stored


def read_labels(folder: str | Path, stage: str, backbone: str | None) -> Iterator[dict[str, Any]]:
    """All labels of a finished folder by column, in order.

    Args:
        folder: where they lie.
        stage: name of the stage that made them.
        backbone: fingerprint of the VLM that is to be trained on them; None does not compare.

    Raises:
        ValueError: the labels are unfinished, damaged, of another stage, or made by another backbone.
    """
    yield from labels_of(folder, read_manifest(folder, stage), backbone)


def labels_of(folder: str | Path, stored: dict[str, Any], backbone: str | None) -> Iterator[dict[str, Any]]:
    """As `read_labels`, of a folder whose manifest is read already.

    Args:
        stored: manifest of the folder.
    """
    if backbone is not None and stored["backbone"] != backbone:
        raise ValueError(
            f"labels={folder} were made by another backbone than the model that is to be trained: run "
            f"{stored['stage']!r} with this model first, or set other_backbone=true if you know that it only differs "
            "in precision."
        )
    names: set[str] = set()
    for number in range(stored["shards"]):
        path = _shard_path(Path(folder), number, stored["shards"])
        try:
            records = read_parquet(path)
        except ValueError as error:
            raise ValueError(f"{error}; {_REMAKE}.") from error
        if records:
            names = names or {"id", *records[0]}
            if names != set(records[0]):
                raise ValueError(f"{path} holds {sorted(records[0])} where labels have {sorted(names)}; {_REMAKE}.")
        yield from records
