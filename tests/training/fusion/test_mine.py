"""Mining of stage 2: who is right, plain or zoomed, recorded for every row."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.asking.answers import ask_batch
from modeling_qzoom.asking.config import JudgeConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.training.common.label_store import read_labels
from modeling_qzoom.training.fusion import mine as mine_fusion
from modeling_qzoom.training.fusion.config import MineFusionConfig
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import write_data, write_model


REGION = {"region_threshold": 0.9, "region_threshold_mode": "peak"}


def config(folder: Path, model: str, data: str, **options) -> MineFusionConfig:
    options = {"output": str(folder / "labels"), "max_new_tokens": 4, "batch_size": 3, "shard_size": 4, **options}
    return MineFusionConfig(model=model, data=data, **options)


def direct(settings: MineFusionConfig) -> list[tuple[str, str, object]]:
    """Per row, plain and zoomed answer and the report, one row a call."""
    session = open_session(settings)
    found = []
    for row in load_rows(settings):
        question = [(row.load_image(), row.question)]
        (plain,) = ask_batch(session, question, zoom="never")
        (zoomed,) = ask_batch(session, question, zoom="always")
        found.append((plain.text, zoomed.text, zoomed.report))
    return found


def answer_rows(data: str, answers: list) -> None:
    """Replace the answers of a JSONL file."""
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    lines = [json.dumps({**row, "answer": answer}) for row, answer in zip(rows, answers, strict=True)]
    Path(data).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_cases(family, tmp_path, caplog):
    """Rows are given the plain answer, the zoomed one, both or neither as their truth."""
    model, data = write_model(tmp_path / "model", family, **REGION), write_data(tmp_path / "data")
    settings = config(tmp_path, model, data)
    rows = direct(settings)
    truths = [[[plain], [zoomed], [plain, zoomed], ["else"]][n % 4] for n, (plain, zoomed, _) in enumerate(rows)]
    answer_rows(data, truths)
    with caplog.at_level(logging.INFO):
        mine_fusion.run(settings)
    records = list(read_labels(settings.output, "mine-fusion", None))

    assert [(record["plain"], record["zoomed"]) for record in records] == [row[:2] for row in rows]
    boxes = [list(report.box) if report.zoomed else None for _, _, report in rows]
    assert [record["box"] for record in records] == boxes and any(boxes)
    cases = [(record["plain_right"], record["zoomed_right"]) for record in records]
    # exact judges ignore case
    same = [plain.lower() == zoomed.lower() for plain, zoomed, _ in rows]
    right = [[(True, same[n]), (same[n], True), (True, True), (False, False)][n % 4] for n in range(len(rows))]
    assert cases == right
    assert [record["regression"] for record in records] == [case == (True, False) for case in cases]
    assert (True, False) in cases and (False, True) in cases
    assert f"plain right, zoomed wrong (regressions): {cases.count((True, False))}" in caplog.text
    assert f"both wrong: {cases.count((False, False))}" in caplog.text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder of a tiny model, data file)."""
    folder = tmp_path_factory.mktemp("mining")
    return write_model(folder / "model", "qwen2_5_vl", **REGION), write_data(folder / "data")


def test_bad_rows_are_named_and_skipped(checkpoint, tmp_path, caplog):
    model, data = checkpoint
    own = write_data(tmp_path / "data")
    lines = Path(own).read_text().splitlines()
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    broken = {**json.loads(lines[1]), "image": "broken.png"}
    unanswered = {**json.loads(lines[5]), "answer": None}
    lines[1], lines[5] = json.dumps(broken), json.dumps(unanswered)
    Path(own).write_text("\n".join(lines))
    settings = config(tmp_path, model, own)
    mine_fusion.run(settings)
    assert [record["id"] for record in read_labels(settings.output, "mine-fusion", None)] == [
        "0-0",
        "1-0",
        "1-1",
        "2-0",
        "3-0",
        "3-1",
    ]
    assert "skipped 0-1" in caplog.text and "skipped 2-1: it has no answer" in caplog.text


def test_an_image_that_the_processor_refuses(checkpoint, tmp_path, caplog):
    """Among others in its batch, only it is skipped."""
    from tests.processing_fixtures import noise

    own = write_data(tmp_path / "data", images=3, questions=1)
    noise(900, 2).save(tmp_path / "data" / "1.png")
    settings = config(tmp_path, checkpoint[0], own)
    mine_fusion.run(settings)
    assert [record["id"] for record in read_labels(settings.output, "mine-fusion", None)] == ["0-0", "2-0"]
    assert "skipped 1-0" in caplog.text


def test_data_without_answers(checkpoint, tmp_path):
    own = write_data(tmp_path / "data")
    with pytest.raises(ValueError, match="8 of 8 rows have no answer.*answer_key"):
        mine_fusion.run(config(tmp_path, checkpoint[0], own, answer_key="truth"))


def test_folder_of_another_judge_or_region_branch(checkpoint, tmp_path):
    """Labels that would come out differently are not mixed."""
    model, data = checkpoint
    settings = config(tmp_path, model, data, limit=4)
    mine_fusion.run(settings)
    mine_fusion.run(settings)  # nothing is left to do
    settings.judge = JudgeConfig(kind="exact", concurrency=2)
    mine_fusion.run(settings)  # how many requests at a time decides nothing
    settings.judge = JudgeConfig(kind="contains")
    with pytest.raises(ValueError, match="settings differ"):
        mine_fusion.run(settings)
    changed = QZoomForConditionalGeneration.from_pretrained(model)
    with torch.no_grad():
        changed.zoom.region.scorer.q_proj.weight.mul_(1.5)
    changed.save_pretrained(tmp_path / "changed")
    open_session(settings).processor.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="settings differ"):
        mine_fusion.run(config(tmp_path, str(tmp_path / "changed"), data, limit=4))


def test_labels_under_other_region_or_crop_rules_are_not_mixed(checkpoint, tmp_path):
    """A rule at its default leaves the settings as they were written before there was one."""
    model, data = checkpoint
    settings = config(tmp_path, model, data, limit=4)
    mine_fusion.run(settings)
    manifest = json.loads((Path(settings.output) / "labels.json").read_text())
    usual = ("region_threshold", "region_threshold_mode", "crop_min_tokens", "crop_max_tokens", "position_alignment")
    assert set(manifest["settings"]["zoom"]) == set(usual)
    for name, value in {"crop_budget": "need", "region_blur": "grid", "region_min_peak": 0.01}.items():
        changed = shutil.copytree(model, tmp_path / name)
        fields = json.loads((changed / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps({**fields, name: value}))
        with pytest.raises(ValueError, match="settings differ"):
            mine_fusion.run(config(tmp_path, str(changed), data, limit=4))
