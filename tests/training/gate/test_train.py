"""`train-gate`: rows at resolutions drawn per epoch, one step on every family, and losses that stay numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import Session, open_session
from modeling_qzoom.training.common.fresh_branches import reset_gate
from modeling_qzoom.training.common.label_store import read_labels
from modeling_qzoom.training.gate import train as train_gate
from modeling_qzoom.training.gate.config import TrainGateConfig
from modeling_qzoom.training.gate.record import GateRecord
from modeling_qzoom.training.gate.rule import select_rows
from modeling_qzoom.training.gate.samples import GateDataset, collate_gates, measure_gates
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import budget, rows_of, write_data, write_gate_labels, write_model


@pytest.fixture(scope="module", params=FAMILIES)
def setting(request, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_model(folder / "model", request.param)
    labels = write_gate_labels(folder / "labels", model, write_data(folder / "data"))
    return {"family": request.param, "model": model, "labels": labels}


@pytest.fixture(scope="module")
def session(setting) -> Session:
    return open_session(ModelConfig(model=setting["model"], **budget(setting["family"])))


def config_of(setting: dict[str, str], output: Path, **fields) -> TrainGateConfig:
    trainer = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "report_to": "none"}
    trainer |= {"disable_tqdm": True}
    return TrainGateConfig(
        model=setting["model"],
        labels=setting["labels"],
        output=str(output),
        trainer=trainer,
        **budget(setting["family"]),
        **fields,
    )


def dataset_of(session: Session, setting, **fields) -> GateDataset:
    config = config_of(setting, Path("unused"), **fields)
    rows = rows_of(setting["labels"], "label-gates")
    records = [GateRecord.from_row(row) for row in read_labels(setting["labels"], "label-gates", None)]
    return GateDataset(session, select_rows(records, config), rows, config, 0)


@pytest.mark.parametrize("labeling", ["consistent", "naive"])
def test_one_step(labeling, setting, tmp_path) -> None:
    train_gate.run(config_of(setting, tmp_path, labeling=labeling))
    start = load_file(Path(setting["model"]) / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    changed = {name for name, weight in found.items() if not torch.equal(weight, start[name])}
    assert "zoom.gate.head.weight" in changed and all(name.startswith("zoom.gate.") for name in changed)
    assert all(bool(weight.isfinite().all()) for weight in found.values())


def test_a_batch_mixes_resolutions(session, setting) -> None:
    dataset = dataset_of(session, setting)
    pad = session.processor.tokenizer.pad_token_id
    items = [dataset[0, index] for index in range(len(dataset))]
    batch = collate_gates(items, pad)
    with torch.no_grad():
        together = session.model(**batch).gate_logits
        alone = torch.cat([session.model(**collate_gates([item], pad)).gate_logits for item in items])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert measure_gates(batch) == {"needs_zoom": (sum(item["target"] for item in items), len(items))}


def test_draws_depend_on_epoch_and_index_only(session, setting) -> None:
    first, second = (dataset_of(session, setting) for _ in range(2))

    def shown(dataset: GateDataset, epoch: int) -> list[tuple[int, float]]:
        items = [dataset[epoch, index] for index in range(len(dataset))]
        return [(item["target"], float(item["features"]["pixel_values"].double().sum())) for item in items]

    epochs = [shown(first, epoch) for epoch in range(4)]
    assert epochs == [shown(second, epoch) for epoch in range(4)]
    assert any(epoch != epochs[0] for epoch in epochs)


def test_a_batch_without_valid_labels_has_no_loss(session, setting) -> None:
    dataset = dataset_of(session, setting)
    batch = collate_gates([dataset[0, 0], dataset[0, 1]], session.processor.tokenizer.pad_token_id)
    batch["gate_targets"] = torch.tensor([-100, -100])
    head = session.model.zoom.gate.head.weight
    loss = session.model(**batch).loss
    (gradient,) = torch.autograd.grad(loss, [head])
    assert loss.item() == 0 and not gradient.any()


def test_a_fresh_gate_is_a_copy_of_the_backbones_layers(session) -> None:
    model = session.model
    before = {name: weight.clone() for name, weight in model.zoom.region.state_dict().items()}
    reset_gate(model)
    for copied, source in zip(model.zoom.gate.layers, model.vlm.get_decoder().layers[3:5], strict=True):
        for name, weight in copied.state_dict().items():
            assert torch.equal(weight, source.state_dict()[name]), name
    assert not model.zoom.gate.head.bias.any() and 0 < model.zoom.gate.head.weight.std() < 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in model.zoom.region.state_dict().items())


def test_a_model_without_a_gate_is_refused(setting, tmp_path) -> None:
    from modeling_qzoom import QZoomForConditionalGeneration
    from tests.processing_fixtures import PROCESSORS
    from tests.tiny import tiny_vlm

    model = QZoomForConditionalGeneration.from_backbone(
        tiny_vlm(setting["family"]), branch_layer=3, branch_depth=2, has_gate=False
    )
    model.save_pretrained(tmp_path / "model")
    PROCESSORS[setting["family"]]().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="This checkpoint has no gate"):
        train_gate.run(config_of({**setting, "model": str(tmp_path / "model")}, tmp_path / "output"))
