"""The converter on folders that it cannot convert: each error names its cause, and nothing is written."""

import os
import re

import pytest
import torch

from hub_release.convert_official import convert
from hub_release.official.format import ConversionError
from tests.official_fixtures import shard, write_folder
from tests.tiny import tiny_model


@pytest.fixture
def model():
    return tiny_model("qwen2_5_vl")


def refused(source, tmp_path, match):
    with pytest.raises(ConversionError, match=match):
        convert(source, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "name",
    [
        "twig_layers.0.mlp.up_proj.weight",
        "twig_layers.1.self_attn.q_proj.weight",
        "high_res_layers.1.input_layernorm.weight",
        "high_res_head.bias",
    ],
)
def test_a_missing_branch_weight_is_named(model, tmp_path, name):
    source = write_folder(tmp_path / "source", model, drop=rf"^model\.{re.escape(name)}$")
    refused(source, tmp_path, rf"lacks branch weights: \['{re.escape(name)}'\] \(1 in all\)")


def test_a_branch_layer_too_many(model, tmp_path):
    extra = {"model.twig_layers.2.mlp.up_proj.weight": torch.zeros(128, 64)}
    source = write_folder(tmp_path / "source", model, extra=extra)
    refused(source, tmp_path, r"belong to no layer: \['twig_layers.2.mlp")


def test_a_missing_vlm_weight_is_named(model, tmp_path):
    source = write_folder(tmp_path / "source", model, drop=r"layers\.4\.mlp\.down_proj")
    refused(source, tmp_path, r"model.language_model.layers.4.mlp.down_proj.weight'\] \(1 in all\).*--base")


def test_a_weight_of_the_wrong_shape(model, tmp_path):
    source = write_folder(tmp_path / "source", model, extra={"model.high_res_head.weight": torch.zeros(1, 32)})
    refused(source, tmp_path, "source")


def test_only_pickled_weights(model, tmp_path):
    source = write_folder(tmp_path / "source", model)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path, "convert them to safetensors")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"twig_K": None}, "not a Q-Zoom or SD-RPN checkpoint"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"high_res_K": 2}, "different layers|read different"),
        ({"twig_K": 6}, "exceeds the VLM's 6 decoder layers"),
    ],
)
def test_configurations(model, tmp_path, settings, match):
    refused(write_folder(tmp_path / "source", model, **settings), tmp_path, match)


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "is not a folder")


def test_no_config(model, tmp_path):
    source = write_folder(tmp_path / "source", model)
    (source / "config.json").unlink()
    refused(source, tmp_path, "holds no config.json")


def test_damaged_files_are_named(model, tmp_path):
    source = write_folder(tmp_path / "source", model)
    whole = (source / "config.json").read_bytes()
    names = shard(source)
    (source / "config.json").write_text('{"twig_K": ')
    refused(source, tmp_path, "config.json cannot be read")
    (source / "config.json").write_bytes(whole)
    os.truncate(source / names[1], 200)
    refused(source, tmp_path, f"{names[1]} cannot be read: it is cut short")
