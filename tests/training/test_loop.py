"""The training loop: schedule, resuming, what is left on the disk."""

import pytest
import torch
from torch import nn

from modeling_qzoom.training.loop import fit, load_state, load_step, rate, save_state


def test_rate_warms_up_holds_and_falls() -> None:
    assert rate(0.0, 0, warm=10, decay=0.5) == pytest.approx(0.1)
    assert rate(0.4, 40, warm=10, decay=0.5) == 1.0
    assert rate(0.75, 75, warm=10, decay=0.5) == pytest.approx(0.5)
    assert rate(0.99, 99, warm=10, decay=0.0) == 1.0
    assert rate(1.0, 100, warm=10, decay=0.5) == pytest.approx(0.03)


def _problem(seed: int):
    torch.manual_seed(seed)
    module = nn.Linear(3, 1)
    inputs = torch.randn(32, 3)
    goal = inputs @ torch.tensor([[1.0], [-2.0], [0.5]])
    seen = []

    def step_loss(done: float):
        seen.append(done)
        loss = (module(inputs) - goal).square().mean()
        return loss, {"loss": loss.item(), "absent": float("nan")}

    return module, step_loss, seen


def test_fit_learns_and_leaves_only_the_result(tmp_path) -> None:
    module, step_loss, _ = _problem(0)
    before = step_loss(0.0)[0]
    path = tmp_path / "stage.safetensors"
    fit(module, [torch.optim.AdamW(module.parameters(), lr=0.1)], step_loss, 120, path, warm=5)
    assert step_loss(1.0)[0] < 0.05 * before
    assert [file.name for file in tmp_path.iterdir()] == ["stage.safetensors"]
    other = nn.Linear(3, 1)
    load_state(other, path)
    assert torch.equal(other.weight, module.weight)


def test_fit_resumes_at_the_saved_step(tmp_path) -> None:
    module, step_loss, seen = _problem(1)
    path = tmp_path / "stage.safetensors"
    save_state(module, tmp_path / "stage-running.safetensors", step=90)
    assert load_step(tmp_path / "stage-running.safetensors") == 90
    nn.init.zeros_(module.weight)
    fit(module, [torch.optim.AdamW(module.parameters(), lr=0.0)], step_loss, 100, path)
    assert len(seen) == 10 and seen[0] == 0.9
    assert module.weight.abs().sum() > 0
