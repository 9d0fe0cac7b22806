"""The stock Trainer in two processes learns what it learns in one, whatever part of the model a pass leaves out."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.training.two_processes import RUNS, UNEVEN, model_of, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "-m", "tests.training.two_processes", str(folder)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name, folder):
    both = load_file(folder / f"{name}.safetensors")
    start = model_of(name).state_dict()
    assert any(not torch.equal(both[key], value) for key, value in start.items())
    if name in UNEVEN:
        assert all(bool(value.isfinite().all()) for value in both.values())
        return
    for key, value in train(name, 4).items():
        torch.testing.assert_close(both[key], value, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
