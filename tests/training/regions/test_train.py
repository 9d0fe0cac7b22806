"""`train-regions`: questions share sequences, each is asked at its own last prompt token, any family trains."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import Session, open_session
from modeling_qzoom.data.config import DataConfig
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.data.rows import Row
from modeling_qzoom.training.regions import train as train_regions
from modeling_qzoom.training.regions.config import LabelRule, TrainRegionsConfig
from modeling_qzoom.training.regions.samples import (
    RegionDataset,
    coarse_grid,
    collate_regions,
    measure_regions,
    right_records,
    sequences,
    usable_records,
)
from modeling_qzoom.training_losses_qzoom import IGNORED
from tests.tiny import FAMILIES, tiny_vlm
from tests.training.stage_fixtures import (
    budget,
    region_record,
    rows_of,
    write_data,
    write_model,
    write_region_labels,
)


RULE = LabelRule(dilation=0)


def make_setting(folder: Path, family: str) -> dict[str, str]:
    model = write_model(folder / "model", family)
    data = write_data(folder / "data")
    labels = write_region_labels(folder / "labels", model, data)
    return {"family": family, "model": model, "labels": labels, "data": data}


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request, tmp_path_factory) -> dict[str, str]:
    return make_setting(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, str]:
    """One family, where families cannot differ."""
    return make_setting(tmp_path_factory.mktemp("single"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def session(setting) -> Session:
    return open_session(ModelConfig(model=setting["model"], **budget(setting["family"])))


def config_of(setting: dict[str, str], output: Path, **fields) -> TrainRegionsConfig:
    trainer = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "report_to": "none"}
    trainer |= {"disable_tqdm": True} | fields.pop("trainer", {})
    return TrainRegionsConfig(
        model=setting["model"],
        labels=setting["labels"],
        output=str(output),
        rule=RULE,
        trainer=trainer,
        **budget(setting["family"]),
        **fields,
    )


@pytest.mark.parametrize("output_format", ["full", "addon"])
def test_an_output_folder_that_holds_another_model_is_refused_before_the_run(single, output_format, tmp_path) -> None:
    tiny_vlm("qwen2_5_vl").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a plain 'qwen2_5_vl' model"):
        train_regions.run(config_of(single, tmp_path, output_format=output_format))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def dataset_of(session: Session, setting, most: int) -> RegionDataset:
    rows = rows_of(setting["labels"], "label-regions")
    records = [region_record(row, seed=number) for number, row in enumerate(rows.values())]
    return RegionDataset(session, sequences(records, most), rows, RULE)


def test_one_step(setting, tmp_path) -> None:
    train_regions.run(config_of(setting, tmp_path))
    start = load_file(Path(setting["model"]) / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    changed = {name for name, weight in found.items() if not torch.equal(weight, start[name])}
    assert changed and all(name.startswith("zoom.region.") for name in changed)


def test_a_question_in_company_gets_the_logits_it_gets_alone(session, setting) -> None:
    pad = session.processor.tokenizer.pad_token_id
    together, alone = dataset_of(session, setting, 2), dataset_of(session, setting, 1)
    batch = collate_regions([together[0, 0], together[0, 1]], pad)
    assert batch["query_positions"].shape == (2, 2)
    with torch.no_grad():
        joint = session.model(**batch).region_logits
        first = session.model(**collate_regions([alone[0, 0]], pad)).region_logits
    # causal attention: the first question does not see the second one
    torch.testing.assert_close(joint[0][0][0], first[0][0][0], atol=1e-4, rtol=1e-4)


def test_every_question_is_asked_at_its_last_prompt_token(session, setting) -> None:
    item = dataset_of(session, setting, 2)[0, 0]
    ids = item["features"]["input_ids"][0]
    for column in item["columns"]:
        assert session.processor.tokenizer.decode(ids[: column + 1]).endswith("<|im_start|>assistant\n")
    assert item["columns"][-1] == len(ids) - 1


def test_shorter_rows_are_padded(session, setting) -> None:
    pad = session.processor.tokenizer.pad_token_id
    pair, single = dataset_of(session, setting, 2)[0, 0], dataset_of(session, setting, 1)[0, 0]
    batch = collate_regions([pair, single], pad)
    assert batch["query_positions"][1].tolist() == [batch["input_ids"].shape[1] - 1, -1]
    assert batch["region_targets"][1].shape[0] == 2
    assert bool((batch["region_targets"][1][1] == IGNORED).all())
    one = measure_regions(collate_regions([single], pad))
    both = measure_regions(collate_regions([single, pair], pad))
    assert both["labelled_cells"][1] == 3 * one["labelled_cells"][1]


def test_no_graph_is_kept_below_the_branch(session, setting) -> None:
    from modeling_qzoom.training.common.trainer import hold_trainable

    item = dataset_of(session, setting, 1)[0, 0]
    model = session.model
    seen = []
    hook = model.vlm.get_decoder().layers[2].register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        hold_trainable(model, [model.zoom.region])
        model(**collate_regions([item], session.processor.tokenizer.pad_token_id)).loss.backward()
    finally:
        hook.remove()
        model.requires_grad_(False)
    assert len(seen) == 1 and not seen[0].requires_grad
    for weight in model.zoom.region.parameters():
        weight.grad = None


def test_questions_about_an_image_share_sequences() -> None:
    rows = [Row(str(n), None, "?", ("x",), name) for n, name in enumerate("aababa")]
    records = [region_record(row) for row in rows]
    groups = [[record.id for record in group] for group in sequences(records, 3)]
    assert groups == [["0", "1", "3"], ["5"], ["2", "4"]]


def test_maps_without_a_label_are_dropped(single, caplog) -> None:
    rows = list(load_rows(DataConfig(data=single["data"])))
    records = [region_record(row, seed=number) for number, row in enumerate(rows)]
    records[1].grounding[:] *= 1e-4  # below the faintest peak
    with caplog.at_level("INFO"):
        kept = usable_records(records, RULE, None)
    assert [record.id for record in kept] == [row.id for row in rows if row.id != rows[1].id]
    assert f"{len(rows) - 1} of {len(rows)} maps hold labels" in caplog.text
    with pytest.raises(ValueError, match="None of the 1 maps holds a label"):
        usable_records(records[1:2], RULE, None)


def test_maps_of_wrong_answers_can_be_left_out(single) -> None:
    rows = rows_of(single["labels"], "label-regions").values()
    records = [region_record(row) for row in rows]
    records[0] = dataclasses.replace(records[0], response="something else")
    records[1] = dataclasses.replace(records[1], answers=())
    assert [record.id for record in right_records(records)] == [record.id for record in records[2:]]
    with pytest.raises(ValueError, match="None of the 2 responses is the annotated answer"):
        right_records(records[:2])


def test_the_coarse_grid_keeps_the_aspect() -> None:
    assert coarse_grid((16, 32), 128) == (8, 16)
    assert coarse_grid((4, 6), 128) == (4, 6)
    assert coarse_grid((4, 6), None) == (4, 6)


def test_labels_of_another_backbone_are_refused(single, tmp_path) -> None:
    other = write_model(tmp_path / "other", single["family"], seed=5)
    config = config_of({**single, "model": other}, tmp_path / "output")
    with pytest.raises(ValueError, match="made by another backbone"):
        train_regions.run(config)
    config.other_backbone = True
    train_regions.run(config)


def test_data_that_changed_is_noticed(tmp_path) -> None:
    model, data = write_model(tmp_path / "model", "llava"), write_data(tmp_path / "data", images=1)
    labels = write_region_labels(tmp_path / "labels", model, data)
    assert list(rows_of(labels, "label-regions")) == ["0-0", "0-1"]
    Path(data).write_text(Path(data).read_text().replace("what is 1?", "where is 1?"))
    with pytest.raises(ValueError, match="rows have changed since"):
        rows_of(labels, "label-regions")


def test_continuing_starts_from_the_branch_as_it_is(single, tmp_path) -> None:
    start = load_file(Path(single["model"]) / "model.safetensors")
    frozen = {"learning_rate": 0.0, "max_steps": 1}
    for reset in (False, True):
        train_regions.run(config_of(single, tmp_path / str(reset), reset=reset, trainer=frozen))
    kept, fresh = (load_file(tmp_path / str(reset) / "model.safetensors") for reset in (False, True))
    query = "zoom.region.scorer.q_proj.weight"
    assert torch.equal(kept[query], start[query]) and not torch.equal(fresh[query], start[query])
    layer = next(name for name in start if name.endswith(".layers.4.self_attn.q_proj.weight") and "vlm" in name)
    assert torch.equal(fresh[query], start[layer])
    gate = "zoom.gate.head.weight"
    assert torch.equal(fresh[gate], start[gate])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_two_processes(family, tmp_path) -> None:
    model = write_model(tmp_path / "model", family)
    data = write_data(tmp_path / "data", images=8)
    labels = write_region_labels(tmp_path / "labels", model, data)
    launch = Path(train_regions.__file__).parents[1] / "configs" / "launch" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "modeling_qzoom.training", "train-regions"]
    options = {"model": model, "labels": labels, "rule.dilation": 0, **budget(family)}
    options |= {"trainer.num_train_epochs": 2, "trainer.report_to": "none"}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def launched(output: str, processes_batch: int) -> dict[str, torch.Tensor]:
        given = {**options, "output": str(tmp_path / output), "trainer.per_device_train_batch_size": processes_batch}
        arguments = [f"{name}={value}" for name, value in given.items()]
        subprocess.run([*command, *arguments], env=environment, check=True, timeout=300, capture_output=True)
        return load_file(tmp_path / output / "model.safetensors")

    two = launched("two", 2)
    config = config_of(
        {"family": family, "model": model, "labels": labels},
        tmp_path / "one",
        trainer={"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-4},
    )
    train_regions.run(config)
    one = load_file(tmp_path / "one" / "model.safetensors")
    start = load_file(Path(model) / "model.safetensors")
    query = "zoom.region.scorer.q_proj.weight"
    moved = [(weights[query] - start[query]).flatten() for weights in (one, two)]
    # the same rows in the same steps; a mean over halves of a batch is not quite the mean over all of it
    assert moved[0].norm() > 0 and torch.cosine_similarity(*moved, dim=0) > 0.95


def test_a_4_bit_backbone_stays_4_bit(single, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText

    from tests.processing_fixtures import PROCESSORS
    from tests.tiny import vlm_config

    wide = vlm_config("qwen2_5_vl")
    wide.vision_config.hidden_size = 64  # a block of 4-bit weights
    AutoModelForImageTextToText.from_config(wide).save_pretrained(tmp_path / "base")
    PROCESSORS["qwen2_5_vl"]().backbone_processor.save_pretrained(tmp_path / "base")
    plain = {"branch_layer": 3, "branch_depth": 2, "load_in_4bit": True, "output_format": "addon"}
    config = config_of({**single, "model": str(tmp_path / "base")}, tmp_path / "output", other_backbone=True, **plain)
    train_regions.run(config)
    held = load_file(tmp_path / "output" / "model.safetensors")
    assert held and all(name.startswith("zoom.") for name in held)
    assert all(weight.is_floating_point() and bool(weight.isfinite().all()) for weight in held.values())
    base = load_file(tmp_path / "base" / "model.safetensors")
    layer = next(name for name in base if name.endswith("layers.4.self_attn.q_proj.weight"))
    assert not torch.equal(held["zoom.region.scorer.q_proj.weight"].float(), base[layer].float())
