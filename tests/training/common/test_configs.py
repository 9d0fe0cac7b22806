"""The configurations that ship: every one loads, and a family's stages fit together."""

from pathlib import Path

import pytest

from modeling_qzoom import training
from modeling_qzoom.asking.judges import judge_for
from modeling_qzoom.asking.session import Session
from modeling_qzoom.training.__main__ import STAGES
from modeling_qzoom.training.common.arguments import training_arguments
from modeling_qzoom.training.common.config_files import load_config
from modeling_qzoom.visor_configurations_qzoom import check_router, check_visor
from tests.tiny import tiny_model


FOLDER = Path(training.__file__).parent / "configs"
# hub name, K and T as published
PUBLISHED = {
    "qwen2_5_vl_3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 24, 3),
    "qwen2_5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 18, 3),
    "qwen3_vl_4b": ("Qwen/Qwen3-VL-4B-Instruct", 24, 3),
    "llava_1_5_7b": ("llava-hf/llava-1.5-7b-hf", 15, 3),
}
LAYERS = {"qwen2_5_vl_3b": 36, "qwen2_5_vl_7b": 28, "qwen3_vl_4b": 36, "llava_1_5_7b": 32}
REFIT = "-2.5"


def configs(family: str) -> dict[str, object]:
    """A family's configurations by file name."""
    return {
        path.stem: load_config(STAGES[path.stem.removesuffix(REFIT)].config, path, [])
        for path in sorted((FOLDER / family).glob("*.yaml"))
    }


def test_every_family_has_every_stage():
    assert {path.name for path in FOLDER.iterdir()} == {*PUBLISHED, "launch"}
    for family in PUBLISHED:
        refits = {"label-regions-2.5", "train-regions-2.5"} if family == "qwen3_vl_4b" else set()
        assert set(configs(family)) == set(STAGES) | refits


@pytest.mark.parametrize("family", PUBLISHED)
def test_models_are_the_published_ones(family):
    name, layer, depth = PUBLISHED[family]
    found = {(config.model, config.branch_layer, config.branch_depth) for config in configs(family).values()}
    assert {entry for entry in found if not entry[0].startswith("runs/")} == {(name, layer, depth)}


@pytest.mark.parametrize("family", PUBLISHED)
def test_stages_take_what_earlier_ones_write(family):
    """In the order of the stages; the re-fit follows stage 2."""
    found = configs(family)
    order = [name for name in STAGES if name not in ("label-gates", "train-gate", "calibrate")]
    order += [name for name in ("label-regions-2.5", "train-regions-2.5") if name in found]
    order += ["label-gates", "train-gate", "calibrate"]
    written: set[str] = set()
    for name in order:
        config = found[name]
        for field in ("model", "labels", "heads"):
            value = getattr(config, field, None)
            if value is not None and value.startswith("runs/"):
                assert value in written, f"{name}: nobody has written {field}={value}"
        if config.output is not None:
            assert config.output not in written
            written.add(config.output)
    assert len({config.prompt_suffix for name, config in found.items() if name != "find-heads"}) == 1


@pytest.mark.parametrize("family", PUBLISHED)
def test_configurations_of_vision_have_a_letter_a_layer_and_leave_a_place_for_the_router(family):
    found = configs(family)
    visor = {
        "configurations": found["train-vision"].add_configurations,
        "router": {"layer": found["train-router"].layer, "choices": ["dense", "upper", "half", "quarter", "sparse"]},
    }
    check_visor(visor, LAYERS[family])
    check_router(visor, LAYERS[family])
    assert len(visor["configurations"]) == 4


@pytest.mark.parametrize("family", PUBLISHED)
def test_options_are_ones_that_the_stages_take(family, tmp_path):
    session = Session(tiny_model("qwen2_5_vl"), None, None)
    for name, config in configs(family).items():
        if hasattr(config, "trainer"):
            config.output = str(tmp_path)
            arguments = training_arguments(config, session, {})
            rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
            assert rows == (64 if name == "train-fusion" else 128)
        if hasattr(config, "judge"):
            judge_for(config.judge, session)
        has_budget = config.min_tokens is not None or config.max_tokens is not None
        assert not (family.startswith("llava") and (has_budget or getattr(config, "crop_max_tokens", None)))
