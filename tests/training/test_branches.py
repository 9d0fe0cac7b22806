"""Branch training through `forward`: losses fall, the backbone stays, batches are balanced."""

import random

import pytest
import torch

from modeling_qzoom.evaluation.synthetic import (
    PageSettings,
    coarse_questions,
    code_question,
    draw_page,
)
from modeling_qzoom.training.branches import BranchRow, balance, prompt_inputs, train_branch
from modeling_qzoom.training.views import whole_view


@pytest.fixture(scope="module")
def rows() -> list[BranchRow]:
    found = []
    for seed in range(4):
        page = draw_page(seed, PageSettings(side=(300, 400)))
        view = whole_view(page, 20)
        region = torch.zeros(view.grid, dtype=torch.long)
        region[0], region[-1] = 1, -100
        found.append(BranchRow(view, code_question(page, 0), region=region, gate=1))
        found.append(BranchRow(view, coarse_questions(page)[0], region=region, gate=0))
    return found


@pytest.mark.parametrize("branch", ["region", "gate"])
def test_a_branch_learns_and_the_rest_stays(branch, model, tokenizer, rows, tmp_path) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    targets = {
        "region": {"region_targets": [row.region for row in rows]},
        "gate": {"gate_targets": torch.tensor([row.gate for row in rows])},
    }[branch]
    with torch.no_grad():
        first = model(**prompt_inputs(rows, tokenizer), **targets).loss
    train_branch(model, tokenizer, rows, branch, 24, tmp_path / "branch.safetensors", batch_size=8)
    with torch.no_grad():
        last = model(**prompt_inputs(rows, tokenizer), **targets).loss
    assert last < 0.7 * first
    for name, weight in model.state_dict().items():
        assert name.startswith(f"zoom.{branch}.") or torch.equal(weight, before[name]), name
    assert (tmp_path / "branch.safetensors").exists()


def test_an_unknown_branch_is_refused(model, tokenizer, rows, tmp_path) -> None:
    with pytest.raises(ValueError, match="'region' or 'gate'"):
        train_branch(model, tokenizer, rows, "twig", 1, tmp_path / "x.safetensors")


def test_balance_takes_as_many_of_each_kind(rows) -> None:
    uneven = rows[:2] + [row for row in rows if row.gate == 0]
    chosen = balance(uneven, random.Random(0))
    assert sorted(row.gate for row in chosen) == [0, 1]
    with pytest.raises(ValueError, match="one kind is missing"):
        balance([row for row in rows if row.gate == 0], random.Random(0))
