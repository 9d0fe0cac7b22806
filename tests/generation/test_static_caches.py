"""Static caches: made once the prefill knows how long it is, and decoded with or without compilation."""

import pytest
import torch
from transformers import CompileConfig, StaticCache

from tests.generation_fixtures import always, mixed, no_zoom, shared_model
from tests.tiny import FAMILIES


NEW_TOKENS = 5
SETTINGS = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True}
WAYS = {
    "mixed": {},
    "all zoom": always(),
    "none zooms": no_zoom(),
    "foveated": always(keep_share=0.25),
    "never": {"zoom": "never"},
}
families = pytest.mark.parametrize("family", FAMILIES)


def assert_close(ours, theirs) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


@families
@pytest.mark.parametrize("way", WAYS)
def test_a_static_cache_answers_as_a_growing_one(family, way):
    model = shared_model(family)
    inputs, options = mixed(family)
    options = {**options, **WAYS[way]}
    static = model.generate(**inputs, **options, **SETTINGS, cache_implementation="static")
    assert_close(static, model.generate(**inputs, **options, **SETTINGS))
    assert isinstance(static.past_key_values, StaticCache)


@families
def test_beams_and_sampled_sequences_on_a_static_cache(family):
    inputs, options = mixed(family)
    for settings in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}):
        answers = []
        for kind in ({}, {"cache_implementation": "static"}):
            torch.manual_seed(0)
            answers.append(shared_model(family).generate(**inputs, **options, **settings, **kind, max_new_tokens=4))
        assert torch.equal(*answers)


def test_the_cache_is_as_long_as_the_call_needs():
    """It holds the crop and all new tokens, and no call changes the model."""
    model = shared_model("qwen2_5_vl")
    inputs, options = mixed("qwen2_5_vl")
    before = set(vars(model))
    output = model.generate(
        **inputs, **options, max_new_tokens=70, cache_implementation="static", return_dict_in_generate=True
    )
    length = output.past_key_values.layers[0].max_cache_len
    assert length >= output.past_key_values.get_seq_length() and length % 64 == 0
    assert {name for name in set(vars(model)) - before if "zoom" in name} == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch.compile's own, while it is imported
@pytest.mark.parametrize("keep_share", [1.0, 0.25])
def test_a_compiled_step_answers_as_a_plain_one(keep_share):
    inputs, options = mixed("qwen2_5_vl")
    compile_config = CompileConfig(fullgraph=False)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators alone unless told so
    options |= {"keep_share": keep_share, **SETTINGS}
    model = shared_model("qwen2_5_vl")
    compiled = model.generate(**inputs, **options, cache_implementation="static", compile_config=compile_config)
    assert_close(compiled, model.generate(**inputs, **options))
