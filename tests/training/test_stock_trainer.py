"""The stock Trainer of transformers: checkpoints are restored in full, and evaluation copes with ragged outputs."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_qzoom import QZoomForConditionalGeneration
from tests.families import FAMILY
from tests.loading_fixtures import weights_equal
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


load = QZoomForConditionalGeneration.from_pretrained
GRIDS = [(3, 4), (2, 5), (4, 4), (1, 3)]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def rows_of(family: str, numbers: list[int]) -> dict:
    return plain_inputs(make_inputs(family, [Row([None, "item", f" {x}"], [GRIDS[x]], x) for x in numbers]))


def with_labels(inputs: dict) -> dict:
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def with_maps(family: str, numbers: list[int]) -> dict:
    inputs = rows_of(family, numbers)
    grids = [(4, 4) if not FAMILY[family].has_budget else GRIDS[x] for x in numbers]
    return {**inputs, "region_targets": [torch.ones(1, *grid) for grid in grids]}


def with_targets(family: str, numbers: list[int]) -> dict:
    """Maps of one size, so that Trainer can join those of several batches."""
    maps = torch.stack([torch.full((1, 3, 3), float(x % 2)) for x in numbers])
    return {
        **rows_of(family, numbers),
        "region_targets": maps,
        "gate_targets": torch.tensor([float(x > 1) for x in numbers]),
    }


def make_trainer(model, collate, folder, **options) -> Trainer:
    fixed = {"report_to": [], "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=2, **fixed, **options
    )
    data = list(range(4))
    return Trainer(model=model, args=arguments, data_collator=collate, train_dataset=data, eval_dataset=data)


def assert_same(model, other) -> None:
    one, two = model.state_dict(), other.state_dict()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


def test_resuming_restores_every_weight(family, tmp_path):
    def collate(numbers):
        return with_labels(rows_of(family, numbers))

    options = {"max_steps": 2, "save_steps": 2, "logging_strategy": "no"}
    first = make_trainer(tiny_model(family), collate, tmp_path, **options)
    first.train()
    # other weights, so that one that is not restored shows
    second = make_trainer(tiny_model(family, 3), collate, tmp_path, **options)
    second.train(resume_from_checkpoint=True)
    assert_same(second.model, first.model)


def test_the_best_model_is_the_one_at_the_end(family, tmp_path):
    """A weight that is not found by its name in a checkpoint would stay as the last step left it."""

    def collate(numbers):
        return with_labels(rows_of(family, numbers))

    trainer = make_trainer(
        tiny_model(family),
        collate,
        tmp_path,
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="age",
        greater_is_better=False,
    )
    ages = itertools.count()
    trainer.compute_metrics = lambda _: {"age": next(ages)}  # so the first is the best, whatever the loss does
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best, last = (load(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    assert not weights_equal(best, last)
    assert_same(trainer.model, best)


def test_sharded_checkpoints_and_single_files_fit_by_name(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    sharded, single = tiny_model(family, 3), tiny_model(family, 4)
    load_sharded_checkpoint(sharded, str(tmp_path / "shards"), strict=False)
    assert_same(sharded, model)
    result = single.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    assert_same(single, model)
    assert not result.missing_keys and not result.unexpected_keys


def test_names_of_ones_own_load_strictly_and_others_are_reported(family):
    model, other = tiny_model(family), tiny_model(family, 3)
    own = model.state_dict()
    other.load_state_dict(own, strict=True)
    assert_same(other, model)
    with pytest.raises(RuntimeError, match="nobody.knows"):
        other.load_state_dict({**own, "nobody.knows": torch.zeros(1)})
    result = other.load_state_dict({"zoom.gate.head.bias": torch.ones(1), "strange": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["strange"] and len(result.missing_keys) == len(own) - 1
    assert other.zoom.gate.head.bias.item() == 1


def test_tied_weights_are_restored_though_saved_once(tmp_path):
    model, other = tiny_model("qwen2_5_vl"), tiny_model("qwen2_5_vl", 3)
    for part in (model, other):
        part.config.vlm_config.tie_word_embeddings = part.vlm.config.get_text_config().tie_word_embeddings = True
        part.vlm.lm_head.weight = part.get_input_embeddings().weight
    state = {name: value for name, value in model.state_dict().items() if name != "vlm.lm_head.weight"}
    state["vlm.visual.patch_embed.proj.weight"] = state.pop("vlm.model.visual.patch_embed.proj.weight")
    result = other.load_state_dict(state, strict=False)
    assert result.missing_keys == ["vlm.lm_head.weight"] and not result.unexpected_keys
    assert_same(other, model)


def gate_accuracy(prediction) -> dict[str, float]:
    region_labels, gate_labels = prediction.label_ids
    assert region_labels.shape == (4, 1, 3, 3)
    return {"accuracy": float(np.mean((prediction.predictions > 0) == (gate_labels > 0.5)))}


def test_predictions_are_the_gate_logits(family, tmp_path):
    model = tiny_model(family)

    def collate(numbers):
        return with_targets(family, numbers)

    trainer = make_trainer(model, collate, tmp_path, label_names=["region_targets", "gate_targets"])
    trainer.compute_metrics = gate_accuracy
    output = trainer.predict(list(range(4)))
    logits = torch.cat([model(**collate([x])).gate_logits for x in range(4)])
    np.testing.assert_allclose(output.predictions, logits.detach().numpy(), atol=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == output.metrics["test_accuracy"]
    losses = [model(**collate(numbers)).loss.item() for numbers in ([0, 1], [2, 3])]
    assert abs(metrics["eval_loss"] - sum(losses) / 2) < 1e-4


@pytest.mark.parametrize("option", [{"prediction_loss_only": True}, {"eval_do_concat_batches": False}])
def test_maps_of_many_sizes_are_evaluated(family, option, tmp_path):
    model = tiny_model(family)

    def collate(numbers):
        return with_maps(family, numbers)

    trainer = make_trainer(model, collate, tmp_path, label_names=["region_targets"], **option)
    losses = [model(**collate(numbers)).loss.item() for numbers in ([0, 1], [2, 3])]
    assert abs(trainer.predict(list(range(4))).metrics["test_loss"] - sum(losses) / 2) < 1e-4
    assert abs(trainer.evaluate()["eval_loss"] - sum(losses) / 2) < 1e-4


def test_language_predictions_hold_logits_only(family, tmp_path):
    def collate(numbers):
        return with_labels(rows_of(family, numbers))

    trainer = make_trainer(tiny_model(family), collate, tmp_path)
    output = trainer.predict(list(range(4)))
    assert isinstance(output.predictions, np.ndarray) and output.predictions.shape[::2] == (4, 320)


def test_a_checkpoint_without_a_weight_of_the_vlm_is_reported(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "checkpoint")
    state = load_file(tmp_path / "checkpoint" / "model.safetensors")
    name = next(name for name in state if "mlp" in name and name.startswith("vlm."))
    del state[name]
    with pytest.raises(RuntimeError, match="Missing key"):
        tiny_model(family).load_state_dict(state)
