"""`train-vision`: what a step trains under, what changes, runs that go on, fresh pages, and what is refused."""

from pathlib import Path

import pytest
import torch

from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.asking.session import Session, open_session
from modeling_qzoom.data.config import DataConfig
from modeling_qzoom.training.common import run as runs
from modeling_qzoom.training.common.answer_inputs import stack_answers
from modeling_qzoom.training.common.answered import SameRows, epoch_rows
from modeling_qzoom.training.common.trainer import StageTrainer
from modeling_qzoom.training.vision import train as train_vision
from modeling_qzoom.training.vision.config import TrainVisionConfig
from modeling_qzoom.training.vision.configurations import configuration_at
from modeling_qzoom.training.vision.samples import AnswerSamples
from tests.lora_support import needs_lora
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import budget, write_data, write_model
from tests.training.test_forward_training import right_padded


# peft asks transformers in a way that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIGURATIONS = {"upper": "SSSSRR", "mixed": "SRSRTR"}
TRAINER = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "max_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request, tmp_path_factory) -> dict[str, str]:
    return make_setting(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, str]:
    """One family, where families cannot differ."""
    return make_setting("qwen2_5_vl", tmp_path_factory.mktemp("single"))


def make_setting(family: str, folder: Path) -> dict[str, str]:
    data = write_data(folder / "data", images=2)
    return {"family": family, "model": write_model(folder / "model", family), "data": data}


def config_of(setting: dict[str, str], output: Path, trainer: dict | None = None, **fields) -> TrainVisionConfig:
    given = {"method": "full", "add_configurations": CONFIGURATIONS, "data": setting["data"], **fields}
    return TrainVisionConfig(
        model=setting["model"],
        output=str(output),
        trainer=TRAINER | (trainer or {}),
        **budget(setting["family"]),
        **given,
    )


def batch_of(session: Session, setting: dict[str, str]) -> dict:
    samples = AnswerSamples(session, epoch_rows(DataConfig(data=setting["data"])))
    items = [samples[0, index] for index in range(len(samples))]
    return stack_answers(items, session.processor.tokenizer.pad_token_id)


def changed(before, after) -> set[str]:
    old = dict(before.named_parameters())
    return {name for name, weight in after.named_parameters() if not torch.equal(weight, old[name])}


def is_of_decoder(name: str) -> bool:
    return "language_model" in name and (".layers." in name or name.endswith("language_model.norm.weight"))


def test_learns_every_configuration_and_changes_the_decoder_only(setting, tmp_path):
    config = config_of(setting, tmp_path, {"max_steps": 12, "learning_rate": 2e-3})
    train_vision.run(config)
    before = QZoomForConditionalGeneration.from_pretrained(setting["model"])
    after = QZoomForConditionalGeneration.from_pretrained(tmp_path)
    assert after.config.visor == {"configurations": CONFIGURATIONS} and before.config.visor is None
    before.config.visor = after.config.visor
    batch = batch_of(open_session(config), setting)
    for name in ("dense", *CONFIGURATIONS):
        with torch.no_grad():
            losses = [model(**batch, vision=name).loss.item() for model in (before, after)]
            padded = after(**on_the_right(batch), vision=name).loss.item()
        assert losses[1] < 0.8 * losses[0], name
        assert padded == pytest.approx(losses[1], abs=1e-4)
    names = changed(before, after)
    assert names and names == {name for name, _ in after.named_parameters() if is_of_decoder(name)}


def on_the_right(batch: dict) -> dict:
    lengths = batch["attention_mask"].sum(1).tolist()
    labels = torch.stack([row.roll(length, 0) for row, length in zip(batch["labels"], lengths)])
    if len(set(lengths)) == 1:
        return batch
    return {**right_padded(batch), "labels": labels}


@needs_lora
@pytest.mark.parametrize("output_format", ["full", "addon"])
def test_an_adapter(output_format, single, tmp_path):
    model = QZoomForConditionalGeneration.from_pretrained(single["model"])
    model.vlm.save_pretrained(tmp_path / "base")
    model.save_addon(tmp_path / "addon", base_model_name_or_path=tmp_path / "base")
    open_session(config_of(single, tmp_path)).processor.save_pretrained(tmp_path / "addon")
    own = {**single, "model": str(tmp_path / "addon")}
    train_vision.run(config_of(own, tmp_path / "out", method="lora", output_format=output_format))
    after = QZoomForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert after.config.visor == {"configurations": CONFIGURATIONS}
    assert (tmp_path / "out" / "lora").exists() == (output_format == "addon")


def steps_of(config: TrainVisionConfig, monkeypatch, dies_at: int | None = None) -> list[str]:
    """The configurations of a run's steps, which dies in one of them."""
    seen = []

    class Watched(StageTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == dies_at:
                raise KeyboardInterrupt
            seen.append(self._at_step(self.state.global_step)["vision"])
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "StageTrainer", Watched)
        if dies_at is None:
            train_vision.run(config)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_vision.run(config)
    return seen


def test_a_run_that_was_stopped_draws_and_ends_the_same(single, tmp_path, monkeypatch):
    options = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps", "per_device_train_batch_size": 2}
    whole = steps_of(config_of(single, tmp_path / "whole", options), monkeypatch)
    first = steps_of(config_of(single, tmp_path / "stopped", options), monkeypatch, dies_at=3)
    rest = steps_of(config_of(single, tmp_path / "stopped", options), monkeypatch)
    assert first == whole[:3] and rest == whole[2:]
    models = [QZoomForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("whole", "stopped")]
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=0, msg=name)


def test_what_a_step_trains_under():
    names = ["dense", "upper", "mixed"]
    drawn = [configuration_at(names, 3, step) for step in range(60)]
    assert all(set(drawn[start : start + 3]) == set(names) for start in range(0, 60, 3))
    assert len({tuple(drawn[start : start + 3]) for start in range(0, 60, 3)}) > 2
    assert drawn != [configuration_at(names, 4, step) for step in range(60)]
    assert [configuration_at(["upper"], 0, step) for step in range(3)] == ["upper"] * 3


def test_one_configuration(single, tmp_path, monkeypatch):
    config = config_of(single, tmp_path, configurations=["mixed"])
    assert steps_of(config, monkeypatch) == ["mixed"] * 2


def test_drawn_pages_are_new_in_every_epoch(single, tmp_path):
    rows = epoch_rows(DataConfig(data="drawn:train", limit=10, seed=5))
    ids = [[rows.row(epoch, index).id for index in range(len(rows))] for epoch in range(3)]
    pages = [{name.rpartition("-")[0] for name in names} for names in ids]
    assert [len(names) for names in pages] == [3, 3, 3] and len(set.union(*pages)) == 9
    assert ids[0][:8] == [rows.row(0, index).id for index in range(8)]
    assert all(rows.row(1, index).answers for index in range(10))
    train_vision.run(config_of(single, tmp_path, {"max_steps": 3}, data="drawn:train", limit=4))
    assert isinstance(epoch_rows(DataConfig(data=single["data"])), SameRows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add_configurations": {}}, "has no configurations of VISOR; write some into it with add_configurations"),
        ({"configurations": ["dense", "lower"]}, "'lower' is not a configuration of this checkpoint"),
        ({"add_configurations": {"upper": "SSR"}}, "names 3 layers, the VLM's decoder has 6"),
        ({"add_configurations": {"dense": "SSSSSS"}}, "needs a name other than"),
        ({"configurations": []}, "one or more different names"),
        ({"configurations": ["upper", "upper"]}, "one or more different names"),
        ({"method": "full", "output_format": "addon"}, "method=full changes the backbone"),
        ({"data": "drawn:nowhere"}, "There is no split 'nowhere'"),
        ({"data": "drawn:train", "limit": 0}, "limit must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message, single, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_vision.run(config_of(single, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_name_means_one_configuration(single, tmp_path):
    train_vision.run(config_of(single, tmp_path / "first", configurations=["dense"]))
    own = {**single, "model": str(tmp_path / "first")}
    again = config_of(own, tmp_path / "second", add_configurations={"upper": "SSSSSR"})
    with pytest.raises(ValueError, match="'upper' is SSSSRR in this checkpoint, not SSSSSR"):
        train_vision.run(again)


def test_rows_without_an_answer_are_not_trained_on(single, tmp_path):
    path = Path(write_data(tmp_path / "data", images=2))
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[0] = lines[0].replace('"answer": "0"', '"answer": ""')
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(epoch_rows(DataConfig(data=str(path)))) == len(lines) - 1
