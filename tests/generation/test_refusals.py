"""What cannot go with zooming is refused with a reason and a way out; without zooming it works as on the backbone."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import GenerationMixin

from modeling_qzoom.backbone_cache_qzoom import CACHE
from tests.families import FAMILY
from tests.generation_fixtures import always, mixed, no_zoom, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs


families = pytest.mark.parametrize("family", FAMILIES)
WAY_OUT = r".*zoom='never'"


def image_inputs(family="qwen2_5_vl", **changes):
    inputs = make_inputs(family, [Row(["look ", None, " here"], [(3, 4)], 1)])
    return {**inputs, **changes}


def refuse(message, family="qwen2_5_vl", args=(), way_out=WAY_OUT, model=None, **kwargs):
    inputs = {**image_inputs(family), **always(), "max_new_tokens": 2, **kwargs}
    with pytest.raises(ValueError, match=f"(?s){message}{way_out}"):
        (model or shared_model(family)).generate(*args, **inputs)


def full_cache(family="qwen2_5_vl"):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    return cache


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted and prompt-lookup decoding feed the whole prompt again"),
        ({"assistant_early_exit": 2}, "assisted and prompt-lookup decoding"),
        ({"use_mtp": True}, "assisted and prompt-lookup decoding"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate replaces the decoding loop"),
        ({"custom_generate": "somebody/loop"}, "custom_generate replaces the decoding loop"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha selects a decoding loop .* from the Hub"),
        ({"dola_layers": "low"}, "dola_layers selects a decoding loop"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "num_beam_groups selects a decoding loop"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "force_words_ids selects a decoding loop"),
        ({"synced_gpus": True}, "synced_gpus=True needs every process to run the same layers"),
        ({"prefill_chunk_size": 4}, "chunked prefill cannot stop between layers"),
        ({"cache_implementation": "paged"}, "paged generation replaces generate"),
        ({"inputs_embeds": torch.zeros(1, 4, 64)}, "inputs_embeds hide where the images are"),
        ({"past_key_values": full_cache()}, "past_key_values of an earlier turn cannot be continued"),
        ({"output_attentions": True}, "output_attentions=True is not available while zooming"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not available while zooming"),
        ({"use_cache": False}, "zooming needs a plain DynamicCache.*no cache"),
        ({"cache_implementation": "offloaded"}, "zooming needs a plain DynamicCache"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_refusal_says_why_and_how_to_go_on(kwargs, message):
    refuse(message, **kwargs)


def test_assistants_are_refused():
    refuse("assisted and prompt-lookup decoding", assistant_model=shared_model("qwen2_5_vl").vlm)


def test_caches_of_the_caller_that_cannot_grow_are_refused():
    config = shared_model("llava").config.get_text_config()
    static = StaticCache(config=config, max_cache_len=99)
    refuse("StaticCache.*cache_implementation='static'", "llava", past_key_values=static)
    offloading = DynamicCache(config=config, offloading=True)
    refuse("zooming needs a plain DynamicCache", "llava", past_key_values=offloading)


def test_positional_arguments_are_seen():
    """generate(inputs, generation_config, logits_processor, stopping_criteria, prefix_fn, synced_gpus, assistant)"""
    inputs = image_inputs()
    ids = inputs.pop("input_ids")
    for position, message in ((3, "synced_gpus"), (4, "assisted")):
        args = [None] * position + [True if position == 3 else shared_model("qwen2_5_vl").vlm]
        with pytest.raises(ValueError, match=message):
            shared_model("qwen2_5_vl").generate(ids, None, *args, **inputs, **always())


def test_settings_of_generation_configs_are_seen(monkeypatch):
    """The call's, and the model's, which transformers fills the call's up from."""
    refuse("prompt-lookup", generation_config=GenerationConfig(prompt_lookup_num_tokens=2))
    model = shared_model("qwen2_5_vl")
    monkeypatch.setattr(model.generation_config, "output_hidden_states", True)
    refuse("output_hidden_states=True")
    monkeypatch.setattr(model.generation_config, "output_hidden_states", False)
    monkeypatch.setattr(model.generation_config, "prefill_chunk_size", 4)
    refuse("chunked prefill")
    refuse("chunked prefill", generation_config=GenerationConfig(max_new_tokens=2))


@families
def test_right_padding_is_refused(family):
    inputs = make_inputs(family, [Row(["a", None, "b"], [(2, 2)], 1), Row(["long " * 9, None], [(2, 2)], 2)])
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    pads = int((mask[0] == 0).sum())
    ids[0], mask[0] = ids[0].roll(-pads), mask[0].roll(-pads)
    wrong = {**inputs, "input_ids": ids, "attention_mask": mask}
    if FAMILY[family].has_budget:
        wrong["mm_token_type_ids"] = (ids == shared_model(family).config.image_token_id).int()
    message = r"rows \[0\] are padded on the right.*padding_side='left'"
    with pytest.raises(ValueError, match=message):
        shared_model(family).generate(**wrong, **always(), max_new_tokens=2)
    del wrong["attention_mask"]  # then generate infers it
    with pytest.raises(ValueError, match=message):
        shared_model(family).generate(**wrong, **always(), max_new_tokens=2)


@families
def test_right_padded_text_is_refused_too_unless_the_plain_model_is_asked_for(family):
    ids = torch.tensor([[5, 6, 7, 256], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    model = shared_model(family)
    with pytest.raises(ValueError, match=r"rows \[0\] are padded on the right"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=2, zoom="never")
    assert got.equal(model.vlm.generate(ids, attention_mask=mask, max_new_tokens=2))


def custom_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """A greedy loop of the user's own."""
    return GenerationMixin._sample(
        model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    )


def equals_plain(family, inputs, zoom=None, **kwargs):
    model = shared_model(family)
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, **kwargs}
    expected = model.vlm.generate(**plain_inputs(inputs), **settings)
    got = model.generate(**inputs, **({} if zoom is None else {"zoom": zoom}), **settings)
    assert got.sequences.equal(expected.sequences)
    return got, expected


FEATURES = [
    {"prompt_lookup_num_tokens": 2},
    {"prefill_chunk_size": 5},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"cache_implementation": "offloaded"},
    {"custom_generate": custom_loop},
    {"synced_gpus": False},
]
names = {"ids": lambda value: "-".join(value) if isinstance(value, dict) else str(value)}


# offloaded caches move layers with CUDA streams
def runs_here(feature):
    return torch.cuda.is_available() or feature.get("cache_implementation") != "offloaded"


@families
@pytest.mark.parametrize("feature", [feature for feature in FEATURES if runs_here(feature)], **names)
def test_text_prompts_take_every_feature_of_the_backbone(family, feature):
    inputs = make_inputs(family, [Row(["a b c a b c a b c a b"], [], 0)])
    equals_plain(family, inputs, **feature)
    equals_plain(family, inputs, zoom="always", **feature)


@families
@pytest.mark.parametrize("feature", [feature for feature in FEATURES if runs_here(feature)], **names)
def test_without_zooming_images_take_every_feature_of_the_backbone(family, feature):
    equals_plain(family, image_inputs(family), zoom="never", **feature)


@families
def test_without_zooming_states_and_attentions_are_returned(family):
    model = shared_model(family)
    inputs = image_inputs(family)
    got, expected = equals_plain(family, inputs, zoom="never", output_hidden_states=True, output_logits=True)
    assert len(got.hidden_states) == 6
    for step, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert all(one.equal(two) for one, two in zip(step, other, strict=True))
    assert torch.stack(got.logits).equal(torch.stack(expected.logits))
    model.set_attn_implementation("eager")
    try:
        got, expected = equals_plain(family, inputs, zoom="never", output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    assert got.attentions[0][2].equal(expected.attentions[0][2])


@families
def test_text_embeddings_are_accepted(family):
    model = shared_model(family)
    inputs = make_inputs(family, [Row(["only words"], [], 0)])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    settings = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "max_new_tokens": 4}
    got = model.generate(**settings, return_zoom_reports=True, num_beams=2, num_return_sequences=2)
    assert got.sequences.equal(model.vlm.generate(**settings, num_beams=2, num_return_sequences=2))
    assert [report.reason for report in got.zoom_reports] == ["no_image"]


@families
@pytest.mark.parametrize("first_turn", ["never", "closed gate", "text"])
def test_a_plain_turn_can_be_continued_from_its_cache(family, first_turn):
    """Positions travel with the cache, not on the module: a call in between changes nothing."""
    model = shared_model(family)
    rows = [Row(["look ", None, " here"], [(3, 4)], 1), Row(["a longer one ", None], [(4, 2)], 2)]
    if first_turn == "text":
        rows = [Row(["words"], [], 1), Row(["more words"], [], 2)]
    inputs = make_inputs(family, rows)
    options = {"zoom": "never"} if first_turn == "never" else no_zoom()
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    results = []
    for generator, extra in ((model.vlm, {}), (model, {"zoom": "never"})):
        turn = plain_inputs(inputs) if generator is model.vlm else {**inputs, **options}
        first = generator.generate(**turn, **settings)
        if generator is model:
            model.generate(**image_inputs(family), **always(), max_new_tokens=1)
        ids = torch.cat([first.sequences, torch.full((2, 3), 40)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask, CACHE: first.past_key_values}
        results.append(generator.generate(**turn, **settings, **extra))
    expected, got = results
    assert got.sequences.equal(expected.sequences)
    torch.testing.assert_close(got.logits[0], expected.logits[0], atol=1e-4, rtol=0)


@families
@pytest.mark.parametrize("zoom", ["auto", "never"])
def test_a_zoomed_turn_s_cache_cannot_be_continued(family, zoom):
    model = shared_model(family)
    inputs = image_inputs(family)
    first = model.generate(**inputs, **always(), max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.full((1, 30), 40)], dim=1)
    for given in (ids, torch.full((1, 30), 40)):
        with pytest.raises(ValueError, match="holds a crop.*Pass the whole conversation without a cache"):
            model.generate(given, past_key_values=first.past_key_values, zoom=zoom, max_new_tokens=2)
    first.past_key_values.crop(-first.past_key_values.get_seq_length())  # emptied, it is as good as new
    again = model.generate(**inputs, **always(), past_key_values=first.past_key_values, max_new_tokens=2)
    assert again.equal(first.sequences)


@families
def test_refusals_come_before_any_work(family, monkeypatch):
    """No vision tower, no layer, no change to the caller's cache."""
    inputs, options = mixed(family)
    model = shared_model(family)
    monkeypatch.setattr(model.vlm, "get_image_features", None)
    cache = DynamicCache()
    with pytest.raises(ValueError, match="synced_gpus"):
        model.generate(**inputs, **options, synced_gpus=True, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_images_behind_embeddings_are_refused(family):
    model = shared_model(family)
    inputs = make_inputs(family, [Row(["what is ", None, "?"], [(4, 4)])])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="inputs_embeds hide where the images are"):
        model.generate(**inputs, inputs_embeds=embeds, max_new_tokens=1)


def test_paged_batches_with_images_are_refused():
    model = shared_model("qwen2_5_vl")
    ids = make_inputs("qwen2_5_vl", [Row(["what is ", None, "?"], [(4, 4)])])["input_ids"].tolist()
    with pytest.raises(ValueError, match=r"generate_batch.*\[1\] hold image tokens"):
        model.generate_batch(inputs=[[1, 2, 3], *ids], max_new_tokens=1)


@families
def test_the_plain_model_keeps_its_own_rule_for_padding(family):
    model = shared_model(family)
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[70, 71, 72, pad], [73, 74, 75, 76]])
    expected = model.vlm.generate(ids, max_new_tokens=3)
    assert model.generate(ids, max_new_tokens=3, zoom="never").equal(expected)
    # pad tokens that are also end tokens say nothing about padding
    same = {"pad_token_id": pad, "eos_token_id": pad, "max_new_tokens": 3}
    assert model.generate(ids, **same).equal(model.vlm.generate(ids, **same))
    left = ids.flip(1)
    assert model.generate(left, max_new_tokens=3).equal(model.vlm.generate(left, max_new_tokens=3))
