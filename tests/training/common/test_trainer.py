"""Runs: interrupted ones end as uninterrupted ones do, only trained weights change, and options are checked."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.training.common import labelled
from modeling_qzoom.training.common import run as runs
from modeling_qzoom.training.common.arguments import training_arguments
from modeling_qzoom.training.common.run_folder import RECORD, newest_checkpoint, work_folder
from modeling_qzoom.training.common.trainer import (
    WEIGHTS,
    EpochOrder,
    StageTrainer,
    hold_trainable,
    load_trained,
)
from modeling_qzoom.training.regions import train as train_regions
from modeling_qzoom.training.regions.config import LabelRule, TrainRegionsConfig
from tests.tiny import tiny_model
from tests.training.stage_fixtures import budget, write_data, write_model, write_region_labels


FAMILY = "qwen2_5_vl"
OPTIONS = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    model = write_model(folder / "model", FAMILY)
    data = write_data(folder / "data", images=5)
    return {"model": model, "labels": write_region_labels(folder / "labels", model, data)}


@pytest.fixture
def configure(setting, tmp_path):
    def make(output: str = "output", **trainer) -> TrainRegionsConfig:
        return TrainRegionsConfig(
            **{"output": str(tmp_path / output), **setting, **budget(FAMILY)},
            rule=LabelRule(dilation=0),
            trainer=OPTIONS | trainer,
        )

    return make


class Killed(Exception):
    pass


def kill_at(monkeypatch, step: int) -> None:
    """The next run dies within a step."""

    class Dying(StageTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise Killed
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(runs, "StageTrainer", Dying)


def weights_of(config: TrainRegionsConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "model.safetensors")


@pytest.fixture(scope="module")
def reference(setting, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of a run that nothing stopped."""
    config = TrainRegionsConfig(
        **{"output": str(tmp_path_factory.mktemp("reference")), **setting, **budget(FAMILY)},
        rule=LabelRule(dilation=0),
        trainer=OPTIONS,
    )
    train_regions.run(config)
    return weights_of(config)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("step", [3, 7])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(step, configure, reference, monkeypatch) -> None:
    config = configure()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step)
        train_regions.run(config)
    assert not (Path(config.output) / "config.json").exists()
    train_regions.run(config)
    assert_same(weights_of(config), reference)


def test_half_a_checkpoint_is_not_resumed_from(configure, reference, monkeypatch) -> None:
    config = configure()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        train_regions.run(config)
    work = work_folder(config)
    assert newest_checkpoint(work).name == "checkpoint-4"
    shutil.copytree(work / "checkpoint-4", work / "checkpoint-6")
    (work / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    assert newest_checkpoint(work).name == "checkpoint-4"
    train_regions.run(config)
    assert_same(weights_of(config), reference)


def test_only_the_branch_changes(setting, reference) -> None:
    start = load_file(Path(setting["model"]) / "model.safetensors")
    changed = {name for name, weight in reference.items() if not torch.equal(weight, start[name])}
    assert changed == {name for name in start if name.startswith("zoom.region.")}


def test_checkpoints_hold_trained_weights_in_float32(configure) -> None:
    config = configure(num_train_epochs=1)
    train_regions.run(config)
    held = load_file(newest_checkpoint(work_folder(config)) / WEIGHTS)
    assert held and all(name.startswith("zoom.region.") for name in held)
    assert {weight.dtype for weight in held.values()} == {torch.float32}


def test_a_finished_run_is_not_repeated(configure, monkeypatch) -> None:
    config = configure(num_train_epochs=1)
    train_regions.run(config)
    config.trainer = config.trainer | {"logging_steps": 5}
    monkeypatch.setattr(labelled, "open_session", lambda config: pytest.fail("opened again"))
    train_regions.run(config)


def test_an_output_folder_belongs_to_one_run(configure) -> None:
    config = configure(num_train_epochs=1)
    train_regions.run(config)
    config.seed = 1
    with pytest.raises(ValueError, match="whose seed differ"):
        train_regions.run(config)


def test_a_run_does_not_go_on_with_another_backbone(configure, setting, monkeypatch, tmp_path) -> None:
    config = configure()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        train_regions.run(config)
    record = work_folder(config) / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"backbone": "another"}))
    with pytest.raises(ValueError, match="other weights of model"):
        train_regions.run(config)


# later transformers have a second name for it
@pytest.mark.parametrize(
    "option",
    [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(TrainingArguments, name)],
)
def test_gradient_checkpointing_changes_nothing(option, configure, reference, monkeypatch) -> None:
    calls = []
    attention = type(tiny_model(FAMILY).zoom.region.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    config = configure(**{option: True})
    train_regions.run(config)
    assert_same(weights_of(config), reference)
    # a trained layer runs again on the way back, the frozen ones below do not
    assert sorted({calls.count(part) for part in set(calls)}) == [9, 18]


def test_a_16_bit_model_keeps_its_type(setting, configure, tmp_path) -> None:
    config = configure(num_train_epochs=1)
    config.dtype = "bfloat16"
    train_regions.run(config)
    saved = QZoomForConditionalGeneration.from_pretrained(config.output)
    assert {weight.dtype for weight in saved.parameters()} == {torch.bfloat16}
    assert not hasattr(saved.config, "use_cache")


def test_trained_weights_are_held_in_float32() -> None:
    model = tiny_model(FAMILY).to(torch.bfloat16)
    held = hold_trainable(model, [model.zoom.gate])
    assert {name.split(".")[1] for name in held} == {"gate"} and set(held.values()) == {torch.bfloat16}
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (name in held)
        assert weight.dtype == (torch.float32 if name in held else torch.bfloat16)


def test_weights_of_other_parts_are_refused() -> None:
    model = tiny_model(FAMILY)
    hold_trainable(model, [model.zoom.gate])
    with pytest.raises(ValueError, match="other weights than are trained now"):
        load_trained(model, {"zoom.region.scorer.q_proj.weight": torch.zeros(1)})


def test_every_epoch_has_an_order_of_its_own() -> None:
    order, orders = EpochOrder(20, seed=3), []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        keys = list(order)
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
    assert sorted(orders[0]) == list(range(20))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(
    "option, message",
    [
        ({"learning_rte": 1e-3}, "did you mean 'learning_rate'"),
        ({"output_dir": "x"}, "the stage's `output` decides"),
        ({"torch_compile": True}, "compile again and again"),
    ],
)
def test_wrong_options_of_the_trainer_are_named(option, message, configure, setting) -> None:
    session = open_session(ModelConfig(model=setting["model"]))
    config = configure()
    config.trainer = option
    with pytest.raises(ValueError, match=message):
        training_arguments(config, session, {})


def test_the_papers_defaults_give_way_to_the_users(configure, setting) -> None:
    session = open_session(ModelConfig(model=setting["model"]))
    config = configure()
    config.trainer = {"adam_beta2": 0.9, "report_to": "none"}
    arguments = training_arguments(config, session, {"learning_rate": 1e-6})
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.learning_rate) == (0.9, 0.9, 1e-6)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps, arguments.weight_decay) == ("cosine", 0.03, 0.0)
    assert not arguments.bf16 and arguments.use_cpu


def test_a_full_checkpoint_of_a_4_bit_backbone_is_refused(configure) -> None:
    with pytest.raises(ValueError, match="output_format=addon"):
        dataclasses.replace(configure(), load_in_4bit=True)


def test_an_unknown_output_format_is_refused_before_training(configure) -> None:
    with pytest.raises(ValueError, match="output_format must be 'full' or 'addon', got 'addons'"):
        dataclasses.replace(configure(), output_format="addons")
