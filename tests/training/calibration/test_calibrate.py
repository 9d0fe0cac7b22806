"""The calibrate stage: what is written equals what was measured, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration, ZoomReport
from modeling_qzoom.asking.answers import ask_batch
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.training.calibration import calibrate
from modeling_qzoom.training.calibration.candidates import Candidate
from modeling_qzoom.training.calibration.config import CalibrateConfig
from modeling_qzoom.training.calibration.trials import crop_budgets
from modeling_qzoom.zoom_options_qzoom import ZoomOptions
from tests.families import FAMILY
from tests.tiny import FAMILIES, tiny_model, tiny_vlm, vlm_config
from tests.training.fusion.test_mine import answer_rows
from tests.training.stage_fixtures import budget, write_data, write_model


REGION = {"region_threshold": 0.9, "region_threshold_mode": "peak"}
THRESHOLDS = {"absolute": [0.3]}


def prepare(folder: Path, family: str) -> tuple[str, str]:
    """A tiny model, and rows half of which only the zoomed model gets right."""
    model = write_model(folder / "model", family, **REGION)
    data = write_data(folder / "data", images=4, questions=2)
    session = open_session(ModelConfig(model=model, max_new_tokens=4))
    rows = load_rows(CalibrateConfig(data=data))
    batch = [(row.load_image(), row.question) for row in rows]
    plain = [answer.text for answer in ask_batch(session, batch, zoom="never")]
    zoomed = [answer.text for answer in ask_batch(session, batch, zoom="always")]
    answer_rows(data, [(plain if number % 2 else zoomed)[number] or "none" for number in range(len(rows))])
    return model, data


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request, tmp_path_factory):
    """(family, model, data)."""
    return request.param, *prepare(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def qwen(tmp_path, tmp_path_factory):
    """(model that a test may change, data)."""
    kept = tmp_path_factory.getbasetemp() / "calibrate-qwen"
    if not kept.exists():
        prepare(kept.parent / kept.name, "qwen2_5_vl")
    shutil.copytree(kept / "model", tmp_path / "model")
    return str(tmp_path / "model"), str(kept / "data" / "rows.jsonl")


def config(model: str, data: str, **options) -> CalibrateConfig:
    options = {"max_new_tokens": 4, "batch_size": 5, "region_thresholds": THRESHOLDS, **options}
    return CalibrateConfig(model=model, data=data, **options)


def direct(model: str, data: str, **options) -> dict[str, float]:
    """What `generate` does with the rows under these options."""
    session = open_session(ModelConfig(model=model, max_new_tokens=4))
    rows = load_rows(CalibrateConfig(data=data))
    replies = ask_batch(session, [(row.load_image(), row.question) for row in rows], **options)
    answers, reports = [reply.text for reply in replies], [reply.report for reply in replies]
    figures = {
        "accuracy": [answer.lower() == row.answers[0].lower() for answer, row in zip(answers, rows, strict=True)],
        "zoomed_share": [report.zoomed for report in reports],
        "visual_tokens": [report.coarse_tokens + report.crop_tokens for report in reports],
    }
    return {name: sum(values) / len(rows) for name, values in figures.items()}


def test_presets_do_what_the_report_says(prepared, tmp_path):
    family, model, data = prepared
    weights = (Path(model) / "model.safetensors").read_bytes()
    budgets = [] if not FAMILY[family].has_budget else [6, 12]
    report = tmp_path / "deep" / "report.json"
    output = tmp_path / "out"
    calibrate.run(
        config(model, data, output=str(output), crop_max_tokens=budgets, report=str(report), lose_at_most=0.4)
    )
    found = json.loads(report.read_text())
    assert (output / "model.safetensors").read_bytes() == weights
    assert found["data"] == {
        "fingerprint": load_rows(CalibrateConfig(data=data)).fingerprint,
        "rows": 8,
        "skipped": [],
    }

    held = QZoomConfig.from_pretrained(output)
    assert set(held.presets) == {"fast", "balanced", "accurate"}
    for name, options in held.presets.items():
        figures = found["presets"][name]
        assert figures["options"] == options
        expected = direct(str(output), data, effort=name)
        assert expected == pytest.approx({key: figures[key] for key in expected})
    balanced = found["presets"]["balanced"]
    assert direct(str(output), data)["accuracy"] == pytest.approx(balanced["accuracy"])  # the defaults now
    accurate = found["presets"]["accurate"]
    assert accurate["accuracy"] == max(entry["accuracy"] for entry in found["points"])
    assert direct(str(output), data, zoom="never")["accuracy"] == pytest.approx(found["plain_accuracy"])

    # any other point, too, is what a direct run gives
    odd = found["points"][len(found["points"]) // 2 - 3]
    expected = direct(str(output), data, **odd["options"])
    assert expected == pytest.approx({key: odd[key] for key in expected})


def test_cost_is_what_the_reports_of_a_direct_run_cost(qwen, tmp_path):
    """Of the same rows asked through the evaluation's own door, which counts the prompt's tokens from its inputs."""
    from modeling_qzoom.asking.answers import ask
    from modeling_qzoom.asking.cost import answer_flops
    from modeling_qzoom.cost_qzoom import PrefillCost
    from modeling_qzoom.zoom_options_qzoom import resolve_options

    model, data = qwen
    report = tmp_path / "report.json"
    calibrate.run(config(model, data, report=str(report), crop_max_tokens=[12]))
    session = open_session(ModelConfig(model=model, max_new_tokens=2))
    rows = [(row.load_image(), row.question) for row in load_rows(CalibrateConfig(data=data))]
    points = json.loads(report.read_text())["points"]
    for point in (points[0], points[len(points) // 3]):
        options = point["options"]
        resolved = resolve_options(options, [], session.model.config, mrope=True)
        cost = PrefillCost(session.model.config, resolved)
        spent = [answer_flops(cost, answer) for answer in ask(session, rows, **options)]
        plain = [answer_flops(cost, answer) for answer in ask(session, rows, zoom="never")]
        assert point["relative_flops"] == pytest.approx(sum(spent) / sum(plain))


def test_in_place_and_again(qwen):
    model, data = qwen
    files = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    calibrate.run(config(model, data, crop_max_tokens=[6]))
    after = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    assert [name for name in after if files.get(name) != after[name]] == ["config.json"]
    old, new = json.loads(files["config.json"]), json.loads(after["config.json"])
    changed = {name for name in new if old.get(name) != new[name]}
    assert changed <= {"presets", "gate_threshold", "region_threshold", "region_threshold_mode", "crop_max_tokens"}
    assert new["crop_max_tokens"] == 6
    first = new["presets"]
    again = config(model, data, crop_max_tokens=[6], region_thresholds={**THRESHOLDS, "peak": [0.9]})
    calibrate.run(again)  # its own defaults are in force now, and lead to the same
    assert json.loads((Path(model) / "config.json").read_text())["presets"] == first


def test_a_lower_bound_of_crops_gives_way(tmp_path):
    model = write_model(tmp_path / "model", "qwen2_5_vl", crop_min_tokens=10, crop_max_tokens=20, **REGION)
    data = write_data(tmp_path / "data")
    calibrate.run(config(model, data, crop_max_tokens=[6, 16]))
    presets = QZoomConfig.from_pretrained(model).presets
    assert all(preset["crop_min_tokens"] == min(10, preset["crop_max_tokens"]) for preset in presets.values())


def test_a_checkpoint_without_a_gate(tmp_path):
    model = tiny_model("qwen2_5_vl", **REGION)
    model.zoom.gate, model.config.has_gate = None, False
    model.save_pretrained(tmp_path / "model")
    from tests.processing_fixtures import PROCESSORS

    PROCESSORS["qwen2_5_vl"](**budget("qwen2_5_vl")).save_pretrained(tmp_path / "model")
    data = write_data(tmp_path / "data")
    calibrate.run(config(str(tmp_path / "model"), data, crop_max_tokens=[6, 12], report=str(tmp_path / "r.json")))
    points = json.loads((tmp_path / "r.json").read_text())["points"]
    assert all("gate_threshold" not in point["options"] and point["zoomed_share"] > 0 for point in points)
    presets = QZoomConfig.from_pretrained(tmp_path / "model").presets
    assert all("gate_threshold" not in preset for preset in presets.values())


def test_bad_rows_and_the_effort_of_old(qwen, tmp_path, caplog):
    """A row without an image is counted; a preset in force by default does not hide the new defaults."""
    model, data = qwen
    values = json.loads((Path(model) / "config.json").read_text())
    values |= {"presets": {"old": {"gate_threshold": 0.9}}, "effort": "old"}
    (Path(model) / "config.json").write_text(json.dumps(values))
    own = shutil.copytree(Path(data).parent, tmp_path / "data")
    (own / "2.png").write_bytes(b"no image")
    calibrate.run(config(model, str(own / "rows.jsonl"), report=str(tmp_path / "r.json")))
    assert json.loads((tmp_path / "r.json").read_text())["data"]["rows"] == 6
    assert "2 of 8 rows skipped" in caplog.text
    assert QZoomConfig.from_pretrained(model).effort is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lose_at_most": 1.0}, "lose_at_most"),
        ({"batch_size": 0}, "batch_size"),
        ({"cost_at_most": 0.5}, "cost_at_most=0.5 cannot be met"),
        ({"region_thresholds": {"relative": [0.1]}}, "region_threshold_mode must be one of"),
        ({"crop_max_tokens": [0]}, "crop_max_tokens must be a positive number"),
    ],
)
def test_refused_options(qwen, options, message):
    before = (Path(qwen[0]) / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        calibrate.run(config(*qwen, **options))
    assert (Path(qwen[0]) / "config.json").read_bytes() == before


def test_refused_models(qwen, tmp_path):
    _, data = qwen
    with pytest.raises(ValueError, match="no folder whose config.json could be changed; give output="):
        calibrate.run(config("someone/model", data))
    tiny_vlm("qwen2_5_vl").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is a plain VLM"):
        calibrate.run(config(str(tmp_path / "plain"), data))


def test_llava_has_no_crop_budgets(tmp_path):
    model = write_model(tmp_path / "model", "llava", **REGION)
    with pytest.raises(ValueError, match="crops of this backbone always have one size"):
        calibrate.run(config(model, write_data(tmp_path / "data"), crop_max_tokens=[8]))
    with pytest.raises(ValueError, match="crop_budget: crops of this backbone always have one size"):
        calibrate.run(config(model, write_data(tmp_path / "data2"), crop_budget=["need"]))


def test_an_output_folder_that_holds_something_else_is_refused_before_the_run(qwen, tmp_path):
    model, data = qwen
    tiny_vlm("llava").save_pretrained(tmp_path / "plain")
    weights = (tmp_path / "plain" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="plain holds a plain 'llava' model, which a full Q-Zoom checkpoint"):
        calibrate.run(config(model, data, output=str(tmp_path / "plain")))
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="lies inside the model's folder"):
        calibrate.run(config(model, data, output=f"{model}/presets"))


def test_no_weights_of_an_earlier_output_are_read(qwen, tmp_path):
    model, data = qwen
    shutil.copytree(model, tmp_path / "out")
    split = tmp_path / "split"
    shutil.copytree(model, split)
    changed = QZoomForConditionalGeneration.from_pretrained(model)
    with torch.no_grad():
        changed.zoom.gate.head.bias += 1
    changed.save_pretrained(split, max_shard_size="300KB")
    calibrate.run(config(str(split), data, output=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded = QZoomForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.zoom.gate.head.bias, changed.zoom.gate.head.bias)


BOUNDS = {"crop_min_tokens": 4, "crop_max_tokens": 20}


@pytest.mark.parametrize(
    ("fields", "options", "expected"),
    [
        (BOUNDS, {}, [("fixed", 4, None, 20)]),
        ({}, {"crop_budget": ["need"], "crop_max_tokens": [12, 6]}, [("need", 6, 6, 6), ("need", 12, 12, 12)]),
        (BOUNDS, {"crop_budget": ["need"]}, [("need", 4, 20, 20)]),
        (
            BOUNDS,
            {"crop_budget": ["fixed", "need"], "crop_max_tokens": [10]},
            [("need", 4, 10, 10), ("fixed", 4, None, 10)],
        ),
        ({"max_tokens": 576}, {"crop_budget": ["visionrl2"]}, [("visionrl2", 64, 160, 288)]),
        ({"max_tokens": 576, "crop_budget": "visionrl2"}, {}, [("visionrl2", 64, 160, 288)]),
        ({"max_tokens": 40}, {"crop_budget": ["visionrl2"]}, [("visionrl2", 64, 160, 64)]),
        ({**BOUNDS, "crop_budget": "need", "crop_target_tokens": 8}, {}, [("need", 4, 8, 20)]),
        ({**BOUNDS, "crop_budget": "need"}, {"crop_max_tokens": [3]}, [("need", 3, 3, 3)]),
    ],
)
def test_crop_budgets_name_every_number(fields, options, expected):
    """So that a preset means the same whatever the others leave in the checkpoint."""
    model = QZoomConfig(vlm_config("qwen2_5_vl"), branch_layer=3, branch_depth=2, **{"max_tokens": 24, **fields})
    budgets = crop_budgets(CalibrateConfig(model="m", data="d", **options), model)
    names = ("crop_min_tokens", "crop_target_tokens", "crop_max_tokens")
    found = [(budget.get("crop_budget", "fixed"), *map(budget.get, names)) for budget in budgets]
    assert found == expected


def test_rules_of_the_crop_s_budget_are_tried(qwen, tmp_path):
    """What is written gives what was measured, with another preset's numbers in the checkpoint."""
    model, data = qwen
    report = tmp_path / "report.json"
    rules = {"crop_budget": ["fixed", "need", "visionrl2"], "crop_max_tokens": [8, 20]}
    calibrate.run(config(model, data, report=str(report), lose_at_most=0.4, **rules))
    found = json.loads(report.read_text())
    tried = {point["options"]["crop_budget"] for point in found["points"]}
    assert tried == {"fixed", "need", "visionrl2"}
    for options in {point["options"]["crop_budget"]: point for point in found["points"]}.values():
        expected = direct(model, data, **options["options"])
        assert expected == pytest.approx({key: options[key] for key in expected})
    for name in QZoomConfig.from_pretrained(model).presets:
        expected = direct(model, data, effort=name)
        assert expected == pytest.approx({key: found["presets"][name][key] for key in expected})


def test_region_rules_in_force_hold_for_the_candidates(qwen):
    """A map that no call would zoom into makes no box here either."""
    model, _ = qwen
    settings = QZoomConfig.from_pretrained(model)
    report = ZoomReport(heatmap=torch.tensor([[0.02, 0.01], [0.0, 0.0]]))
    candidate = Candidate("peak", 0.5)
    assert candidate.box(report, (56, 56), settings, ZoomOptions()) == (0, 0, 28, 28)
    assert candidate.box(report, (56, 56), settings, ZoomOptions(region_min_peak=0.03)) is None
    assert candidate.box(report, (56, 56), settings, ZoomOptions(region_min_contrast=3)) is None


def test_unknown_rules_of_a_budget_are_refused(qwen):
    with pytest.raises(ValueError, match="crop_budget must be one of"):
        calibrate.run(config(*qwen, crop_budget=["needs"]))
