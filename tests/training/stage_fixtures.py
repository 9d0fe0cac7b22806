"""Tiny checkpoints, data and labels for the stages' tests."""

import json
from pathlib import Path

import numpy as np

from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.fingerprints import backbone_fingerprint
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.data.rows import Row
from modeling_qzoom.training.common.config import LabelConfig
from modeling_qzoom.training.common.label_store import Manifest, make_labels, read_manifest
from modeling_qzoom.training.common.labelled import labelled_rows
from modeling_qzoom.training.gate.record import GateRecord
from modeling_qzoom.training.regions.record import RegionRecord
from tests.families import FAMILY
from tests.processing_fixtures import PROCESSORS, noise
from tests.tiny import tiny_model


def budget(family: str) -> dict[str, int]:
    """LLaVA takes no budget."""
    return FAMILY[family].budget(4, 16)


def write_model(folder: Path, family: str, **zoom_config) -> str:
    """A tiny Q-Zoom checkpoint with its processor; its answers end at the tokenizer's end token."""
    model = tiny_model(family, **zoom_config)
    model.save_pretrained(folder)
    PROCESSORS[family]().save_pretrained(folder)
    return str(folder)


def write_data(folder: Path, images: int = 4, questions: int = 2) -> str:
    """A folder of noise and a JSONL file with `questions` rows per image."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(images):
        noise(150 + 20 * number, 120, number).save(folder / f"{number}.png")
        for place in range(questions):
            row = {"id": f"{number}-{place}", "image": f"{number}.png", "question": f"what is {place}?"}
            lines.append(json.dumps({**row, "answer": f"{place}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "rows.jsonl")


def region_record(row, grid: tuple[int, int] = (3, 4), seed: int = 0) -> RegionRecord:
    """A record of `label-regions`: one bright cell on a dim map."""
    rng = np.random.default_rng(seed)
    attention = np.full(grid, 1e-4, dtype=np.float32)
    attention[rng.integers(grid[0]), rng.integers(grid[1])] = 0.2
    return RegionRecord(
        id=row.id,
        image_id=row.image_id,
        question=row.question,
        answers=row.answers,
        response=row.answers[0],
        grounding=attention,
        sinks=np.zeros(grid, dtype=np.float32),
    )


def write_labels(output: Path, stage: str, model: str, data: str, make_record) -> str:
    """Labels of every row, made by `make_record(row, number)`, that belong to a checkpoint."""
    from modeling_qzoom.data.readers import load_rows
    from modeling_qzoom.training.common.label_store import data_settings

    config = LabelConfig(model=model, data=data, output=str(output))
    rows = load_rows(config)
    numbers = {row.id: number for number, row in enumerate(rows)}
    fingerprint = backbone_fingerprint(open_session(ModelConfig(model=model)).model)
    manifest = Manifest(stage, fingerprint, rows.fingerprint, data_settings(config))
    make_labels(
        output, manifest, rows, 4, lambda shard, bad: [make_record(row, numbers[row.id]).to_row() for row in shard]
    )
    return str(output)


def rows_of(folder: str | Path, stage: str) -> dict[str, Row]:
    """The rows that a folder of labels was made from, by id."""
    return labelled_rows(folder, read_manifest(folder, stage))


def write_region_labels(folder: Path, model: str, data: str) -> str:
    """Labels of `label-regions`."""
    return write_labels(folder, "label-regions", model, data, lambda row, number: region_record(row, seed=number))


def gate_record(row, right: list[bool] | None, ladder: list[int], agrees: list[bool] | None = None) -> GateRecord:
    """A record of `label-gates`."""
    return GateRecord(
        id=row.id,
        image_id=row.image_id,
        question=row.question,
        answers=row.answers,
        ladder=ladder,
        replies=["x"] * len(ladder),
        right=right,
        agrees=agrees if agrees is not None else right,
    )


def write_gate_labels(folder: Path, model: str, data: str) -> str:
    """Labels of `label-gates`: even rows need no zoom, odd ones do up to the second of four rungs."""

    def record(row, number):
        return gate_record(row, [number % 2 == 0] * 2 + [True] * 2, [9, 16, 25, 36])

    return write_labels(folder, "label-gates", model, data, record)
