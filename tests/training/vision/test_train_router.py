"""`label-routes` and `train-router`: end to end on tiny models, runs that go on, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.asking.answers import ask_batch
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.data.config import DataConfig
from modeling_qzoom.data.readers import load_rows
from modeling_qzoom.training.common import run as runs
from modeling_qzoom.training.common.label_store import read_labels
from modeling_qzoom.training.common.trainer import StageTrainer
from modeling_qzoom.training.vision import label_routes, train_router
from modeling_qzoom.training.vision.config import LabelRoutesConfig, TrainRouterConfig
from modeling_qzoom.training.vision.route_record import RouteRecord
from modeling_qzoom.training.vision.route_samples import RouteDataset, collate_routes
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import budget, rows_of, write_data, write_labels, write_model
from tests.training.test_forward_training import right_padded


CONFIGURATIONS = {"upper": "SSSSRR", "mixed": "SSRRTR"}
NAMES, LETTERS = ["dense", "mixed", "upper"], ["SSSSSS", "SSRRTR", "SSSSRR"]
TRAINER = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "num_train_epochs": 10,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def routed(row, number: int) -> RouteRecord:
    """A record by which questions about even images need the whole decoder, others the least of it."""
    right = [True, False, False] if int(row.id[0]) % 2 == 0 else [True, True, True]
    return RouteRecord(row.id, row.question, row.answers, NAMES, LETTERS, ["x"] * 3, right)


def make_setting(family: str, folder: Path) -> dict[str, str]:
    model = write_model(folder / "model", family, visor={"configurations": CONFIGURATIONS})
    data = write_data(folder / "data", images=4)
    labels = write_labels(folder / "labels", "label-routes", model, data, routed)
    return {"family": family, "model": model, "data": data, "labels": labels}


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request, tmp_path_factory) -> dict[str, str]:
    return make_setting(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, str]:
    """One family, where families cannot differ."""
    return make_setting("qwen2_5_vl", tmp_path_factory.mktemp("single"))


def config_of(setting: dict[str, str], output: Path, trainer: dict | None = None, **fields) -> TrainRouterConfig:
    given = {"model": setting["model"], "labels": setting["labels"], **fields}
    trainer = TRAINER | (trainer or {})
    return TrainRouterConfig(output=str(output), trainer=trainer, **budget(setting["family"]), **given)


def label_config(setting: dict[str, str], output: Path, **fields) -> LabelRoutesConfig:
    sizes = {"max_new_tokens": 3, "batch_size": 3, "shard_size": 4, **budget(setting["family"])}
    return LabelRoutesConfig(
        **{"model": setting["model"], "data": setting["data"], "output": str(output), **sizes, **fields}
    )


def batch_of(setting: dict[str, str]) -> dict:
    session = open_session(ModelConfig(model=setting["model"], **budget(setting["family"])))
    records = [RouteRecord.from_row(row) for row in read_labels(setting["labels"], "label-routes", None)]
    routes = [(record, int(record.right[1])) for record in records]
    dataset = RouteDataset(session, routes, rows_of(setting["labels"], "label-routes"))
    items = [dataset[0, index] for index in range(len(dataset))]
    return collate_routes(items, session.processor.tokenizer.pad_token_id)


def test_the_router_learns_and_nothing_else_changes(setting, tmp_path):
    train_router.run(config_of(setting, tmp_path))
    after = QZoomForConditionalGeneration.from_pretrained(tmp_path)
    assert after.config.visor == {"configurations": CONFIGURATIONS, "router": {"layer": 2, "choices": NAMES}}
    start, found = (load_file(Path(folder) / "model.safetensors") for folder in (setting["model"], tmp_path))
    new = {name for name in found if name not in start}
    assert new and all(name.startswith("visor.router.") for name in new)
    assert all(torch.equal(found[name], weight) for name, weight in start.items())
    batch = batch_of(setting)
    with torch.no_grad():
        output = after(**batch)
        lengths = batch["attention_mask"].sum(1)
        other = output if bool((lengths == lengths[0]).all()) else after(**right_padded(batch))
    torch.testing.assert_close(other.route_logits, output.route_logits, atol=1e-4, rtol=0)
    assert output.route_loss < 0.5  # log 3 is what nobody has learned
    assert torch.equal(output.route_logits.argmax(-1), batch["route_targets"])


def test_labels_say_what_each_configuration_answers(setting, tmp_path):
    config = label_config(setting, tmp_path)
    label_routes.run(config)
    records = [RouteRecord.from_row(row) for row in read_labels(tmp_path, "label-routes", None)]
    rows = list(load_rows(DataConfig(data=setting["data"])))
    assert [record.id for record in records] == [row.id for row in rows]
    session = open_session(config)
    for record, row in list(zip(records, rows))[::3]:
        assert (record.configurations, record.letters) == (NAMES, LETTERS)
        for name, reply, right in zip(NAMES, record.replies, record.right):
            (alone,) = ask_batch(session, [(row.load_image(), row.question)], zoom="never", vision=name)
            assert reply == alone.text and right == (reply in row.answers)


def test_labels_of_other_configurations_are_not_gone_on_with(single, tmp_path):
    label_routes.run(label_config(single, tmp_path, configurations=["dense", "upper"]))
    with pytest.raises(ValueError, match="labels whose settings differ"):
        label_routes.run(label_config(single, tmp_path))


def test_a_run_that_was_stopped_ends_as_one_that_was_not(single, tmp_path, monkeypatch):
    options = {"num_train_epochs": 3, "save_steps": 2, "save_strategy": "steps"}
    train_router.run(config_of(single, tmp_path / "whole", options))

    class Dying(StageTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "StageTrainer", Dying)
        train_router.run(config_of(single, tmp_path / "stopped", options))
    train_router.run(config_of(single, tmp_path / "stopped", options))
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    for name, weight in whole.items():
        torch.testing.assert_close(stopped[name], weight, atol=1e-6, rtol=0, msg=name)


def test_a_router_that_goes_on_and_one_in_its_place(single, tmp_path):
    short = {"max_steps": 1, "warmup_steps": 0}
    train_router.run(config_of(single, tmp_path / "first", short, layer=1, choices=["upper", "dense", "mixed"]))
    own = {**single, "model": str(tmp_path / "first")}
    train_router.run(config_of(own, tmp_path / "second", short, reset=False))
    second = QZoomForConditionalGeneration.from_pretrained(tmp_path / "second")
    assert second.config.visor["router"] == {"layer": 1, "choices": ["upper", "dense", "mixed"]}
    first = QZoomForConditionalGeneration.from_pretrained(tmp_path / "first")
    moved = (second.visor.router.outer.bias - first.visor.router.outer.bias).abs().max()
    assert 0 < moved < 0.05  # one step from where it was
    with pytest.raises(ValueError, match="reset=false goes on with the checkpoint's router"):
        train_router.run(config_of(own, tmp_path / "third", short, reset=False, layer=2))
    train_router.run(config_of(own, tmp_path / "third", short, choices=["dense", "mixed"]))
    third = QZoomForConditionalGeneration.from_pretrained(tmp_path / "third")
    assert third.config.visor["router"] == {"layer": 2, "choices": ["dense", "mixed"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": ["dense", "lower"]}, "'lower' is not a configuration of this checkpoint"),
        ({"layer": 4}, "in front of layer 4, but its choices share the first 2 layers"),
        ({"layer": 0}, "in front of layer 0"),
        ({"choices": ["dense"]}, "two or more different names"),
        ({"wrong": "keep"}, "wrong must be one of"),
        ({"reset": False}, "the checkpoint's router, which is None"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message, single, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_router.run(config_of(single, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_configurations(single, tmp_path):
    model = write_model(tmp_path / "model", "qwen2_5_vl")
    plain = {**single, "model": model}
    with pytest.raises(ValueError, match="this checkpoint has no configurations of VISOR"):
        train_router.run(config_of(plain, tmp_path / "out"))
    with pytest.raises(ValueError, match="this checkpoint has no configurations of VISOR"):
        label_routes.run(label_config(plain, tmp_path / "labels"))
    assert not (tmp_path / "labels").exists()


def test_labels_of_another_backbone(single, tmp_path):
    other = write_model(tmp_path / "model", "qwen2_5_vl", visor={"configurations": CONFIGURATIONS})
    model = QZoomForConditionalGeneration.from_pretrained(other)
    with torch.no_grad():
        model.vlm.lm_head.weight.mul_(1.1)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="another backbone"):
        train_router.run(config_of({**single, "model": other}, tmp_path / "out"))
