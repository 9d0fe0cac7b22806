"""DistributedDataParallel, which by default stops when a pass leaves a trainable weight out, runs every pass.

One process suffices for it to notice. `tests/training/test_two_processes.py` compares what two of them learn.
"""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


ROWS = [Row(["a ", None, " question"], [(2, 3)], 5), Row(["another", None], [(3, 3)], 6)]
MAPS = [torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])] * 2
NOTHING = torch.full((2,), -100)
# calls of one run each: several, where processes or steps may get different kinds of targets
RUNS = {
    "labels": ["labels"],
    "fused labels": ["fused"],
    "logits": ["logits"],
    "region": [{"region_targets": MAPS}],
    "gate": [{"gate_targets": torch.tensor([1.0, 0.0])}],
    "both": [{"region_targets": MAPS, "gate_targets": torch.tensor([1.0, 0.0])}],
    "no region targets": [{"region_targets": [None, None]}],
    "no targets at all": [{"region_targets": [None, None], "gate_targets": NOTHING}],
    "every kind in turn": ["labels", {"region_targets": MAPS}, "fused", {"gate_targets": NOTHING}],
}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def loss_of(model, inputs: dict, call) -> torch.Tensor:
    labels = inputs["input_ids"].clone()
    if call == "labels":
        return model(**plain_inputs(inputs), labels=labels).loss
    if call == "fused":
        return model(**inputs, labels=labels, zoom_boxes=[(0, 0, 40, 40), None]).loss
    if call == "logits":  # as in Trainer with smoothed labels, or with a loss of the user's own
        logits = model(**plain_inputs(inputs)).logits
        return logits.div_(2).logsumexp(-1).mean()
    return model(**plain_inputs(inputs), **call).loss


# in Qwen3-VL the layers above K = 1 get visual features of their own
CASES = [(*model, False, run) for model in [*((family, 3) for family in FAMILIES), ("qwen3_vl", 1)] for run in RUNS]
CASES += [("qwen2_5_vl", 3, True, run) for run, calls in RUNS.items() if isinstance(calls[0], dict)]


@pytest.mark.parametrize("family, branch_layer, frozen, run", CASES)
def test_a_pass_may_leave_weights_out(family, branch_layer, frozen, run):
    model, inputs = tiny_model(family, branch_layer=branch_layer), make_inputs(family, ROWS)
    model.vlm.requires_grad_(not frozen)
    if not FAMILY[family].has_budget:  # its tower's last layer is never used, by the plain VLM either
        model.get_encoder(modality="image").requires_grad_(False)
    parallel, alone = DistributedDataParallel(model), tiny_model(family, branch_layer=branch_layer)
    for call in RUNS[run] * 2:
        parallel.zero_grad()
        alone.zero_grad()
        loss, expected = loss_of(parallel, inputs, call), loss_of(alone, inputs, call)
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        for weight, other in zip(model.parameters(), alone.parameters()):
            if weight.requires_grad:
                torch.testing.assert_close(weight.grad, torch.zeros_like(weight) if other.grad is None else other.grad)


@pytest.mark.parametrize("run", ["labels", "fused labels", "region", "gate"])
def test_without_a_wrapper_what_is_left_out_has_no_gradient(run):
    [call] = RUNS[run]
    model, inputs = tiny_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", ROWS)
    loss_of(model, inputs, call).backward()
    empty = {name for name, weight in model.named_parameters() if weight.grad is None}
    if isinstance(call, str):
        assert empty == {name for name, _ in model.named_parameters() if name.startswith("zoom.")}
        return
    other = "zoom.gate." if "region_targets" in call else "zoom.region."
    assert {name for name, _ in model.named_parameters() if name.startswith(other)} <= empty
    assert "vlm.lm_head.weight" in empty and not any("layers.2.mlp" in name for name in empty)
