"""Opening the model of a stage, and telling backbones apart."""

import pytest
import torch

from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.fingerprints import backbone_fingerprint
from modeling_qzoom.asking.session import open_session, save_session
from tests.processing_fixtures import PROCESSORS
from tests.tiny import FAMILIES, tiny_model, tiny_vlm
from tests.training.stage_fixtures import budget, write_model


def _plain(folder, family: str) -> str:
    tiny_vlm(family).save_pretrained(folder)
    PROCESSORS[family]().backbone_processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_vlm_gets_fresh_branches(family, tmp_path) -> None:
    config = ModelConfig(model=_plain(tmp_path, family), branch_layer=2, branch_depth=3, **budget(family))
    session = open_session(config)
    assert (session.model.config.branch_layer, session.model.config.branch_depth) == (2, 3)
    layers = session.model.vlm.get_decoder().layers
    gate = session.model.zoom.gate
    assert torch.equal(gate.layers[0].self_attn.q_proj.weight, layers[2].self_attn.q_proj.weight)
    assert not session.model.training and session.device.type == "cpu"
    assert session.processor.max_tokens == session.model.config.max_tokens == budget(family).get("max_tokens")


def test_a_checkpoint_keeps_its_budget_unless_told_otherwise(tmp_path) -> None:
    name = write_model(tmp_path, "qwen2_5_vl")
    for options, expected in (({}, (4, 24)), ({"max_tokens": 16}, (4, 16)), ({"min_tokens": 6}, (6, 24))):
        session = open_session(ModelConfig(model=name, **options))
        assert (session.processor.min_tokens, session.processor.max_tokens) == expected
        assert (session.model.config.min_tokens, session.model.config.max_tokens) == expected


def test_dtype_and_attention_reach_the_model(tmp_path) -> None:
    name = write_model(tmp_path, "qwen2_5_vl")
    model = open_session(ModelConfig(model=name, dtype="bfloat16", attn_implementation="eager")).model
    assert model.vlm.dtype == torch.bfloat16 and model.vlm.config._attn_implementation == "eager"


def test_what_is_saved_opens_again(tmp_path) -> None:
    session = open_session(ModelConfig(model=write_model(tmp_path / "first", "qwen3_vl"), max_tokens=12))
    save_session(session, tmp_path / "second")
    again = open_session(ModelConfig(model=str(tmp_path / "second")))
    assert again.processor.max_tokens == 12
    for (name, old), (_, new) in zip(session.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(old, new), name
    with pytest.raises(ValueError, match="output_format must be 'full' or 'addon', got 'half'"):
        save_session(session, tmp_path / "third", "half")


def test_an_addon_is_saved_beside_its_base(tmp_path) -> None:
    base = _plain(tmp_path / "base", "qwen2_5_vl")
    session = open_session(ModelConfig(model=base, branch_layer=3, branch_depth=2, **budget("qwen2_5_vl")))
    save_session(session, tmp_path / "addon", "addon")
    again = open_session(ModelConfig(model=str(tmp_path / "addon")))
    assert backbone_fingerprint(again.model) == backbone_fingerprint(session.model)
    assert isinstance(again.processor, QZoomProcessor)


def test_fingerprints_tell_weights_and_architectures_apart() -> None:
    first = tiny_model("qwen2_5_vl")
    known = backbone_fingerprint(first)
    assert backbone_fingerprint(tiny_model("qwen2_5_vl")) == known
    assert backbone_fingerprint(tiny_model("qwen2_5_vl", seed=1)) != known
    assert backbone_fingerprint(tiny_model("llava")) != known
    with torch.no_grad():
        for parameter in first.zoom.parameters():
            parameter.add_(1)
    assert backbone_fingerprint(first) == known, "branches are not part of the backbone"
    assert backbone_fingerprint(first.to(torch.bfloat16)) == known, "precision is not either"
    with torch.no_grad():
        first.vlm.get_decoder().layers[4].mlp.up_proj.weight[0, 0] += 1
    assert backbone_fingerprint(first) != known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is a plain VLM: say with branch_layer=K"),
        ({"branch_layer": 5, "branch_depth": 3}, r"exceeds the VLM's 6 decoder layers; choose branch_layer ≤ 3"),
        ({"branch_layer": 9}, "exceeds the VLM's 6 decoder layers"),
        ({"branch_layer": 0}, "must be at least 1"),
    ],
)
def test_where_the_branches_read_has_to_fit(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_session(ModelConfig(model=_plain(tmp_path, "qwen2_5_vl"), **options))


def test_models_that_are_none() -> None:
    with pytest.raises(ValueError, match="model=/nowhere/at/all: "):
        open_session(ModelConfig(model="/nowhere/at/all"))


def test_a_backbone_without_a_row(tmp_path) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no row for model_type 'llama'; it knows"):
        open_session(ModelConfig(model=str(tmp_path), branch_layer=1))


def test_the_model_class_is_ours(tmp_path) -> None:
    session = open_session(ModelConfig(model=write_model(tmp_path, "llava")))
    assert isinstance(session.model, QZoomForConditionalGeneration) and session.processor.max_tokens is None
