"""The demo's recipe and ablations: clocks, configurations, figures in README and card, labels from true boxes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hub_release.demo import ablations, recipe
from hub_release.demo.backbone import train
from hub_release.demo.backbone.train import DecoderStage
from hub_release.demo.clock import Clock, history_of
from modeling_qzoom.training.__main__ import STAGES
from modeling_qzoom.training.common.config_files import load_config
from modeling_qzoom.training.common.label_store import read_labels
from tests.training.stage_fixtures import region_record, write_data, write_labels, write_model


ROOT = Path(__file__).resolve().parents[3]


def test_a_clock_adds_up_interrupted_steps(tmp_path) -> None:
    clock = Clock(tmp_path / "work" / "times.json")
    with clock.step("one"):
        pass
    with pytest.raises(KeyboardInterrupt), clock.step("two"):
        raise KeyboardInterrupt
    first = clock.read()
    with Clock(clock.path).step("two"):
        pass
    assert list(clock.read()) == ["one", "two"] and clock.read()["two"] >= first["two"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "hub_release" / "demo" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_demo_configurations_fit_their_stages(path) -> None:
    stage = STAGES[path.stem]
    given = [f"{name}=x" for name in ("model", "output", "labels") if name in stage.config.__dataclass_fields__]
    load_config(stage.config, path, given)


# a stage, and for each of its fields another value
STAGE = DecoderStage("2-search", 4, {"crop": 1}, decay=0.0, lr=1e-3)
CHANGES = {"name": "3-other", "steps": 3, "groups": {"crop": 2}, "decay": 0.5, "lr": 2e-3}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DecoderStage)])
def test_every_field_of_a_stage_is_used(name, tmp_path, monkeypatch) -> None:
    """What reaches the training loop changes with it: file, number and contents of the batches, rates."""

    def training(stage: DecoderStage, work: Path) -> list:
        work.mkdir()
        (work / "1-tower.safetensors").touch()
        runs = []

        def fit(parts, optimizers, steps, step_loss, path, decay):
            runs.append([path.name, len(steps), steps[0].kinds, steps[0].input_ids.tolist(), decay, rates(optimizers)])

        monkeypatch.setattr(train, "fit", fit)
        monkeypatch.setattr(recipe, "load_state", lambda parts, path: None)
        monkeypatch.setattr(recipe, "DECODER_STAGES", (stage,))
        recipe.train_backbone(work, 1.0, "cpu", Clock(work / "times.json"))
        return runs

    def rates(optimizers) -> set[float]:
        return {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}

    changed = dataclasses.replace(STAGE, **{name: CHANGES[name]})
    first, second, other = (
        training(stage, tmp_path / str(number)) for number, stage in enumerate((STAGE, STAGE, changed))
    )
    assert len(first) == 1 and first == second and first != other


def test_seeds_are_spread_by_figure(tmp_path, monkeypatch) -> None:
    figures = {tmp_path / "a": {"recall": 0.5}, tmp_path / "b": {"recall": 0.75}}
    monkeypatch.setattr(recipe, "evaluate", lambda folder, *rest: {"summary": figures[folder]})
    recipe.write_spread(list(figures), tmp_path / "seeds.json", 8)
    written = json.loads((tmp_path / "seeds.json").read_text())
    assert written["seeds"] == 2 and written["spread"]["recall"] == {"lowest": 0.5, "mean": 0.625, "highest": 0.75}


def test_the_history_tells_the_backbone_from_the_stages() -> None:
    times = {
        "1-tower (a GPU)": 90,
        "2-search (a GPU)": 30,
        "find-heads": 60,
        "train-gate": 240,
        "train-gate, seed 1": 999,
    }
    text = history_of(times)
    assert "backbone in 2 minutes on a GPU" in text and "in 5 minutes on CPU cores" in text


def test_figures_go_between_the_markers_of_a_document(tmp_path) -> None:
    first, last = recipe.MARKERS
    for document in (ROOT / "README.md", recipe.REPORT):
        assert document.read_text().count(first) == document.read_text().count(last) == 1
    (tmp_path / "README.md").write_text(f"before\n{first}\nold\n{last}\nbehind\n")
    recipe.write_figures(tmp_path / "README.md", "new")
    assert (tmp_path / "README.md").read_text() == f"before\n{first}\nnew\n{last}\nbehind\n"


def test_true_boxes_become_maps(tmp_path) -> None:
    model, data = write_model(tmp_path / "model", "qwen2_5_vl"), write_data(tmp_path / "data", 1, 2)

    def record(row, number):
        return dataclasses.replace(region_record(row, (3, 4), number), box=(0, 0, 60, 40), image_size=(120, 120))

    labels = write_labels(tmp_path / "labels", "label-regions", model, data, record)
    boxed = ablations.true_box_labels(Path(labels), tmp_path / "boxes")
    ablations.true_box_labels(Path(labels), tmp_path / "boxes")  # again: what exists is kept
    records = list(read_labels(boxed, "label-regions", None))
    assert len(records) == 2
    np.testing.assert_allclose(np.reshape(records[0]["grounding"], (3, 4)), [[1, 1, 0, 0], [0] * 4, [0] * 4])
    assert json.loads((boxed / "labels.json").read_text())["settings"]["maps"] == "true boxes"


def test_ablation_tables_name_their_arms() -> None:
    table = ablations.markdown(
        {"labels": {"self-distilled": {"region_recall": 0.9}, "true boxes": {"region_recall": 1}}}
    )
    assert "| self-distilled | 0.900 |" in table and "| true boxes | 1.000 |" in table and "Self-distilled" in table
