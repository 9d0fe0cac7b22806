"""The launch files are what accelerate reads."""

import json
from pathlib import Path

import pytest
import yaml

import modeling_qzoom.training


LAUNCH = Path(modeling_qzoom.training.__file__).parent / "configs" / "launch"


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_them(name, kind) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert config.distributed_type == kind


def test_every_option_of_fsdp_is_known() -> None:
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    options = yaml.safe_load((LAUNCH / "fsdp2.yaml").read_text())["fsdp_config"]
    assert set(options) <= known
    assert options["fsdp_version"] == 2


def test_the_deepspeed_file_is_where_the_launch_file_says() -> None:
    path = Path(yaml.safe_load((LAUNCH / "zero3.yaml").read_text())["deepspeed_config"]["deepspeed_config_file"])
    assert LAUNCH / "zero3.json" == LAUNCH.parents[3] / path
    options = json.loads((LAUNCH / "zero3.json").read_text())
    assert options["zero_optimization"]["stage"] == 3
    # without it no process holds the weights that are saved at the end
    assert options["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
