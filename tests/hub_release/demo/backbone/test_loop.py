"""The training loop: schedule, resuming, what is left on the disk."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from hub_release.demo.backbone.loop import fit, load_state, load_step, rate, save_state


def test_rate_warms_up_holds_and_falls() -> None:
    assert rate(0.0, 0, warm=10, decay=0.5) == pytest.approx(0.1)
    assert rate(0.4, 40, warm=10, decay=0.5) == 1.0
    assert rate(0.75, 75, warm=10, decay=0.5) == pytest.approx(0.5)
    assert rate(0.99, 99, warm=10, decay=0.0) == 1.0
    assert rate(1.0, 100, warm=10, decay=0.5) == pytest.approx(0.03)


class Numbers(Dataset):
    """The data of step n is n."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def _problem(seed: int):
    torch.manual_seed(seed)
    module = nn.Linear(3, 1)
    inputs = torch.randn(32, 3)
    goal = inputs @ torch.tensor([[1.0], [-2.0], [0.5]])
    seen = []

    def step_loss(step: int):
        seen.append(int(step))
        loss = (module(inputs) - goal).square().mean()
        return loss, {"absent": float("nan")}

    return module, step_loss, seen


def test_fit_learns_and_leaves_only_the_result(tmp_path) -> None:
    module, step_loss, _ = _problem(0)
    before = step_loss(0)[0]
    path = tmp_path / "stage.safetensors"
    fit(module, [torch.optim.AdamW(module.parameters(), lr=0.1)], Numbers(120), step_loss, path, warm=5)
    assert step_loss(0)[0] < 0.05 * before
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
    fit(module, [torch.optim.AdamW(module.parameters(), lr=0.0)], Numbers(100), step_loss, path)
    assert seen == list(range(90, 100))
    assert module.weight.abs().sum() > 0
