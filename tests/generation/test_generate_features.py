"""Decoding features of transformers, with rows in the batch that zoom, skip and have no image."""

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from tests.families import FAMILY
from tests.generation_fixtures import always, mixed, mixed_singles, no_zoom, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs


families = pytest.mark.parametrize("family", FAMILIES)


def tokenizer_of(family):
    return FAMILY[family].tokenizer()


def run(family, **kwargs):
    """The mixed batch as a dict output, and its prompt length."""
    inputs, options = mixed(family)
    settings = {"max_new_tokens": 5, "return_dict_in_generate": True, **options, **kwargs}
    return shared_model(family).generate(**inputs, **settings), inputs["input_ids"].shape[1]


def plain(family, inputs, **kwargs):
    torch.manual_seed(0)
    return shared_model(family).vlm.generate(**plain_inputs(inputs), **kwargs)


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ended += 1


@families
def test_the_mixed_batch_is_mixed(family):
    """What the other tests of this file rely on."""
    reports = run(family, return_zoom_reports=True)[0].zoom_reports
    assert [report.reason for report in reports] == ["gate_open", "no_image", "gate_closed"]
    assert reports[0].zoomed and not reports[2].zoomed


@families
def test_sequences_are_prompt_and_new_tokens(family):
    inputs, options = mixed(family)
    ids = shared_model(family).generate(**inputs, **options, max_new_tokens=5)
    assert isinstance(ids, torch.Tensor) and ids.shape == (3, inputs["input_ids"].shape[1] + 5)
    assert ids[:, :-5].equal(inputs["input_ids"])


@families
def test_rows_equal_themselves_alone(family):
    batch, length = run(family, output_logits=True)
    singles, options = mixed_singles(family)
    for row, inputs in enumerate(singles):
        alone = shared_model(family).generate(
            **inputs, **options, max_new_tokens=5, output_logits=True, return_dict_in_generate=True
        )
        torch.testing.assert_close(
            torch.stack(batch.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=0
        )
        assert batch.sequences[row, length:].equal(alone.sequences[0, -5:])


@families
def test_sampling_is_seeded_and_follows_the_zoomed_logits(family):
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run(family, do_sample=True, temperature=3.0, top_k=0, max_new_tokens=12)[0].sequences)
    assert outputs[0].equal(outputs[1]) and not outputs[0].equal(outputs[2])
    # top_k=1 leaves no choice
    greedy, _ = run(family)
    torch.manual_seed(3)
    assert run(family, do_sample=True, top_k=1)[0].sequences.equal(greedy.sequences)


@families
def test_sampling_equals_the_plain_backbone_when_no_gate_opens(family):
    inputs, _ = mixed(family)
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6}
    expected = plain(family, inputs, **settings)
    torch.manual_seed(0)
    assert shared_model(family).generate(**inputs, **no_zoom(), **settings).equal(expected)


@families
def test_beams_of_a_batch_equal_those_of_its_rows(family):
    settings = {"num_beams": 3, "output_scores": True}
    batch, length = run(family, **settings)
    assert isinstance(batch, GenerateBeamDecoderOnlyOutput) and batch.sequences.shape == (3, length + 5)
    singles, options = mixed_singles(family)
    for row, inputs in enumerate(singles):
        alone = shared_model(family).generate(
            **inputs, **options, **settings, max_new_tokens=5, return_dict_in_generate=True
        )
        assert batch.sequences[row, length:].equal(alone.sequences[0, -5:])
        torch.testing.assert_close(batch.sequences_scores[row], alone.sequences_scores[0], atol=1e-4, rtol=0)


@families
def test_beams_equal_the_plain_backbone_when_no_gate_opens(family):
    inputs, _ = mixed(family)
    settings = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 5, "length_penalty": 0.5}
    expected = plain(family, inputs, **settings)
    assert shared_model(family).generate(**inputs, **no_zoom(), **settings).equal(expected)


@families
def test_beam_sampling_runs(family):
    torch.manual_seed(0)
    output, length = run(family, num_beams=2, do_sample=True, num_return_sequences=2)
    assert output.sequences.shape == (6, length + 5)


@families
def test_num_return_sequences_repeats_rows_in_order(family):
    inputs, _ = mixed(family)
    torch.manual_seed(0)
    output, length = run(family, do_sample=True, temperature=3.0, num_return_sequences=3, return_zoom_reports=True)
    assert output.sequences.shape == (9, length + 5)
    assert output.sequences[:, :length].equal(inputs["input_ids"].repeat_interleave(3, dim=0))
    assert len(output.zoom_reports) == 3
    torch.manual_seed(0)
    first = run(family, do_sample=True, top_k=1, num_return_sequences=3)[0].sequences
    assert first[::3].equal(run(family)[0].sequences) and first[1::3].equal(first[::3])


@families
def test_streamers_get_the_prompt_once_and_then_token_by_token(family):
    inputs, _ = mixed(family)
    recorder = Recorder()
    output, length = run(family, streamer=recorder)
    assert recorder.puts[0].equal(inputs["input_ids"])
    assert len(recorder.puts) == 6 and recorder.ended == 1
    assert torch.stack(recorder.puts[1:], dim=1).equal(output.sequences[:, length:])


@families
def test_text_streamers(family):
    """The stock streamer takes one row."""
    tokenizer = tokenizer_of(family)
    (inputs, *_), options = mixed_singles(family)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = shared_model(family).generate(**inputs, **options, max_new_tokens=5, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape)
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@families
def test_stopping_criteria_see_prompt_and_new_tokens_only(family):
    length = mixed(family)[0]["input_ids"].shape[1]
    criterion = StopAt(length + 2)
    output, _ = run(family, stopping_criteria=StoppingCriteriaList([criterion]))
    assert output.sequences.shape[1] == length + 2
    assert criterion.seen == [(3, length + 1), (3, length + 2)]


@families
def test_stop_strings(family):
    tokenizer = tokenizer_of(family)
    (inputs, *_), options = mixed_singles(family)
    letters = tokenizer("abcdefgh", add_special_tokens=False).input_ids
    settings = {"max_new_tokens": 8, "prefix_allowed_tokens_fn": lambda row, ids: letters, "do_sample": True}
    length = inputs["input_ids"].shape[1]
    texts = []
    for stop in ({}, {"stop_strings": ["b", "d", "f", "h"], "tokenizer": tokenizer}):
        torch.manual_seed(4)
        ids = shared_model(family).generate(**inputs, **options, **settings, temperature=20.0, top_k=0, **stop)
        texts.append(tokenizer.decode(ids[0, length:]))
    free, stopped = texts
    assert len(free) == 8
    assert stopped == free[: 1 + min(free.index(letter) for letter in "bdfh" if letter in free)]


@families
def test_max_length_counts_the_prompt_but_not_the_crop(family):
    length = mixed(family)[0]["input_ids"].shape[1]
    inputs, options = mixed(family)
    assert shared_model(family).generate(**inputs, **options, max_length=length + 3).shape[1] == length + 3


@families
def test_end_tokens_end_each_row_for_itself(family):
    free, length = run(family)
    pad = shared_model(family).generation_config.pad_token_id
    for row in range(3):
        end = int(free.sequences[row, length + 1])
        output, _ = run(family, eos_token_id=end)
        for other in range(3):
            new = free.sequences[other, length:].tolist()
            if end in new:
                stop = new.index(end) + 1
                new = new[:stop] + [pad] * (5 - stop)
            got = output.sequences[other, length:].tolist()
            assert got == new[: len(got)] and set(new[len(got) :]) <= {pad}


@families
def test_logits_and_scores_of_every_step(family):
    output, length = run(family, output_logits=True, output_scores=True, suppress_tokens=[5])
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert len(output.logits) == len(output.scores) == 5
    assert all(step.shape == (3, 320) and step.dtype == torch.float32 for step in output.logits + output.scores)
    assert all((step[:, 5] == -torch.inf).all() for step in output.scores)
    assert all(step.isfinite().all() for step in output.logits)
    assert torch.stack([step.argmax(-1) for step in output.scores], dim=1).equal(output.sequences[:, length:])


class Forbid(LogitsProcessor):
    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


@families
def test_logits_processors(family):
    free, length = run(family)
    token = int(free.sequences[0, length])
    processor = Forbid(token)
    output, _ = run(family, logits_processor=LogitsProcessorList([processor]))
    assert token not in output.sequences[:, length:]
    assert processor.lengths == [length + step for step in range(5)]
    suppressed, _ = run(family, suppress_tokens=[token])
    assert suppressed.sequences.equal(output.sequences)


@families
def test_min_new_tokens_holds_the_end_token_back(family):
    free, length = run(family)
    end = int(free.sequences[0, length])
    assert run(family, eos_token_id=end)[0].sequences[0, length] == end
    output, _ = run(family, eos_token_id=end, min_new_tokens=3)
    assert end not in output.sequences[:, length : length + 3]


@families
def test_prefix_functions(family):
    output, length = run(family, prefix_allowed_tokens_fn=lambda row, ids: [10 + row, 20 + row])
    assert all(set(output.sequences[row, length:].tolist()) <= {10 + row, 20 + row} for row in range(3))


@families
def test_repetition_penalty_sees_the_prompt_as_given(family):
    """Crop tokens are no part of what is penalised: the processor gets the same ids as without zooming."""
    inputs, _ = mixed(family)
    expected = plain(family, inputs, repetition_penalty=1.5, max_new_tokens=5)
    got = shared_model(family).generate(**inputs, **no_zoom(), repetition_penalty=1.5, max_new_tokens=5)
    assert got.equal(expected)
    assert run(family, repetition_penalty=1.5)[0].sequences.shape == expected.shape


@families
def test_use_cache_true_is_the_default(family):
    assert run(family, use_cache=True)[0].sequences.equal(run(family)[0].sequences)


@families
@pytest.mark.parametrize("with_config", [True, False])
def test_an_empty_cache_of_the_caller_is_filled_and_returned(family, with_config):
    model = shared_model(family)
    cache = DynamicCache(config=model.config.get_text_config()) if with_config else DynamicCache()
    output, length = run(family, past_key_values=cache, return_zoom_reports=True)
    assert output.past_key_values is cache
    assert output.sequences.equal(run(family)[0].sequences)


@families
def test_the_cache_holds_the_crop(family):
    """Prompt, markers and crop, and all new tokens but the last, in every layer."""
    (inputs, *_), options = mixed_singles(family)
    output = shared_model(family).generate(
        **inputs, **options, max_new_tokens=4, return_dict_in_generate=True, return_zoom_reports=True
    )
    markers = FAMILY[family].markers
    expected = inputs["input_ids"].shape[1] + output.zoom_reports[0].crop_tokens + markers + 3
    cache = output.past_key_values
    assert cache.get_seq_length() == expected
    assert {layer.keys.shape[2] for layer in cache.layers} == {expected}
    assert len(cache.layers) == 6 and all(layer.keys.isfinite().all() for layer in cache.layers)


@families
def test_ids_may_be_positional(family):
    inputs, options = mixed(family)
    ids = inputs.pop("input_ids")
    config = GenerationConfig(max_new_tokens=5)
    expected = run(family)[0].sequences
    assert shared_model(family).generate(ids, **inputs, **options, max_new_tokens=5).equal(expected)
    assert shared_model(family).generate(inputs=ids, **inputs, **options, max_new_tokens=5).equal(expected)
    assert shared_model(family).generate(ids, config, **inputs, **options).equal(expected)
    # further positional arguments of generate keep their places
    processors = LogitsProcessorList([Forbid(int(expected[0, ids.shape[1]]))])
    assert not shared_model(family).generate(ids, config, processors, **inputs, **options).equal(expected)


@families
def test_masks_are_inferred_from_pads(family):
    inputs, options = mixed(family)
    mask = inputs.pop("attention_mask")
    assert (mask == 0).any()
    assert shared_model(family).generate(**inputs, **options, max_new_tokens=5).equal(run(family)[0].sequences)


@families
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_every_dtype(family, dtype):
    inputs, options = mixed(family)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert shared_model(family).generate(**inputs, **options, max_new_tokens=5).equal(run(family)[0].sequences)


@families
def test_token_types_are_inferred(family):
    inputs, options = mixed(family)
    inputs.pop("mm_token_type_ids", None)
    assert shared_model(family).generate(**inputs, **options, max_new_tokens=5).equal(run(family)[0].sequences)


@families
def test_one_new_token(family):
    output, length = run(family, max_new_tokens=1)
    assert output.sequences[:, length].equal(run(family)[0].sequences[:, length])


@families
def test_calls_leave_no_trace(family):
    """Same answer again, and a text-only call between zoomed ones is the plain one."""
    first = run(family)[0].sequences
    text = make_inputs(family, [Row(["words"], [], 0), Row(["more words than that"], [], 0)])
    got = shared_model(family).generate(**text, max_new_tokens=6)
    assert got.equal(plain(family, text, max_new_tokens=6))
    assert run(family)[0].sequences.equal(first)


@families
def test_unknown_keywords_are_refused_as_by_the_backbone(family):
    inputs, options = mixed(family)
    with pytest.raises(ValueError, match="zoom_level"):
        shared_model(family).generate(**inputs, **options, zoom_level=3, max_new_tokens=1)


@families
def test_inputs_are_not_changed(family):
    inputs, options = mixed(family)
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    sources = [source.clone() for source in inputs["source_images"]]
    config = GenerationConfig(max_new_tokens=3, num_beams=2)
    state = dict(vars(config))
    shared_model(family).generate(**inputs, **options, generation_config=config)
    assert all(inputs[key].equal(value) for key, value in before.items())
    assert all(one.equal(other) for one, other in zip(inputs["source_images"], sources, strict=True))
    assert vars(config) == state


@families
def test_always_zooming_and_returning_many_sequences_keeps_rows_apart(family):
    inputs = make_inputs(family, [Row(["a", None, "?"], [(3, 4)], 1), Row([None, "b?"], [(2, 2)], 2)])
    settings = {**always(), "max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    output = shared_model(family).generate(**inputs, **settings)
    assert output.shape == (4, inputs["input_ids"].shape[1] + 4)
    assert output[0, :-4].equal(output[1, :-4]) and output[2, :-4].equal(output[3, :-4])
    assert not output[0].equal(output[1])
