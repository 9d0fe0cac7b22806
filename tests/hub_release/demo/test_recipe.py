"""The demo's recipe and ablations: clocks, configurations, figures in README and card, labels from true boxes."""

import json
from pathlib import Path

import numpy as np
import pytest

from hub_release.demo import ablations as ablate_demo
from hub_release.demo import recipe as train_demo
from modeling_qzoom.training.common.config_files import load_config
from modeling_qzoom.training.common.label_store import read_labels
from modeling_qzoom.training.stages import STAGES
from tests.training.stage_fixtures import region_record, write_data, write_labels, write_model


ROOT = Path(__file__).resolve().parents[3]


def test_a_clock_adds_up_interrupted_steps(tmp_path) -> None:
    clock = train_demo.Clock(tmp_path / "work" / "times.json")
    with clock.step("one"):
        pass
    with pytest.raises(KeyboardInterrupt), clock.step("two"):
        raise KeyboardInterrupt
    first = clock.read()
    with train_demo.Clock(clock.path).step("two"):
        pass
    assert list(clock.read()) == ["one", "two"] and clock.read()["two"] >= first["two"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "hub_release" / "demo" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_demo_configurations_fit_their_stages(path) -> None:
    stage = STAGES[path.stem]
    given = [f"{name}=x" for name in ("model", "output", "labels") if name in stage.config.__dataclass_fields__]
    load_config(stage.config, path, given)


def test_seeds_are_spread_by_figure(tmp_path, monkeypatch) -> None:
    figures = {tmp_path / "a": {"recall": 0.5}, tmp_path / "b": {"recall": 0.75}}
    monkeypatch.setattr(train_demo, "evaluate", lambda folder, *rest: {"summary": figures[folder]})
    train_demo.write_spread(list(figures), tmp_path / "seeds.json", 8)
    held = json.loads((tmp_path / "seeds.json").read_text())
    assert held["seeds"] == 2 and held["spread"]["recall"] == {"lowest": 0.5, "mean": 0.625, "highest": 0.75}


def test_the_history_tells_the_backbone_from_the_stages() -> None:
    times = {
        "1-tower (a GPU)": 90,
        "2-search (a GPU)": 30,
        "find-heads": 60,
        "train-gate": 240,
        "train-gate, seed 1": 999,
    }
    text = train_demo.history_of(times)
    assert "backbone in 2 minutes on a GPU" in text and "in 5 minutes on CPU cores" in text


def test_figures_go_between_the_markers_of_a_document(tmp_path) -> None:
    first, last = train_demo.MARKERS
    for document in (ROOT / "README.md", train_demo.REPORT):
        assert document.read_text().count(first) == document.read_text().count(last) == 1
    (tmp_path / "README.md").write_text(f"before\n{first}\nold\n{last}\nbehind\n")
    train_demo.write_figures(tmp_path / "README.md", "new")
    assert (tmp_path / "README.md").read_text() == f"before\n{first}\nnew\n{last}\nbehind\n"


def test_true_boxes_become_maps(tmp_path) -> None:
    model, data = write_model(tmp_path / "model", "qwen2_5_vl"), write_data(tmp_path / "data", 1, 2)

    def record(row, number):
        facts = {"box": [0, 0, 60, 40], "image_width": 120, "image_height": 120}
        return {**region_record(row, (3, 4), number), **facts}

    labels = write_labels(tmp_path / "labels", "label-regions", model, data, record)
    boxed = ablate_demo.true_box_labels(Path(labels), tmp_path / "boxes")
    ablate_demo.true_box_labels(Path(labels), tmp_path / "boxes")  # again: what exists is kept
    records = list(read_labels(boxed, "label-regions", None))
    assert len(records) == 2
    np.testing.assert_allclose(np.reshape(records[0]["grounding"], (3, 4)), [[1, 1, 0, 0], [0] * 4, [0] * 4])
    assert json.loads((boxed / "labels.json").read_text())["settings"]["maps"] == "true boxes"


def test_ablation_tables_name_their_arms() -> None:
    table = ablate_demo.markdown(
        {"labels": {"self-distilled": {"region_recall": 0.9}, "true boxes": {"region_recall": 1}}}
    )
    assert "| self-distilled | 0.900 |" in table and "| true boxes | 1.000 |" in table and "Self-distilled" in table
