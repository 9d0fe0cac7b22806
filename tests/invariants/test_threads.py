"""Nothing is kept on modules between calls."""

import sys
import threading

import pytest
import torch
from transformers import DynamicCache

import modeling_qzoom.zoom_decisions_qzoom as decisions
from modeling_qzoom.backbone_cache_qzoom import CACHE
from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model, tiny_vlm


ZOOM = {"zoom": "always", "region_threshold": 0.6, "region_threshold_mode": "peak"}
PLANS = {"gate_branch": "light", "region_branch": "light", "keep_share": 0.3}
AUTO = {**ZOOM, "zoom": "auto", "gate_threshold": 0.5}
LONG = [
    Row([None, "two", None, "images?"], [(2, 3), (4, 4)], seed=11),
    Row(["only text in this row"]),
    Row(["a longer question about ", None, "this picture"], [(3, 5)], seed=12),
]
SHORT = [Row(["see", None, "?"], [(4, 2)], seed=13)]
TEXT = [Row(["no picture"]), Row(["none here either"])]


def generate(model, inputs: dict, **options):
    arguments = {"max_new_tokens": 4, "output_logits": True, "return_zoom_reports": True, "do_sample": False}
    return model.generate(**inputs, **{**arguments, **options})


def summary(output) -> tuple:
    """Everything that a caller can see, comparable."""
    reports = [(report.reason, report.box, report.image_index) for report in output.zoom_reports]
    return output.sequences.tolist(), reports, torch.stack(output.logits)


def assert_same(first: tuple, second: tuple) -> None:
    assert first[:2] == second[:2]
    torch.testing.assert_close(first[2], second[2], atol=1e-5, rtol=0)


def requests(family: str) -> list[tuple[dict, dict]]:
    """(inputs, options) of calls that have little in common."""
    long, short, text = (make_inputs(family, rows) for rows in (LONG, SHORT, TEXT))
    calls = [(long, AUTO), (short, ZOOM), (text, ZOOM), (long, {"zoom": "never"}), (short, AUTO), (long, ZOOM)]
    calls += [(long, {**AUTO, **PLANS}), (short, {**ZOOM, **PLANS})]
    if FAMILY[family].has_budget:
        calls.append((long, {**ZOOM, "position_alignment": "sequential", "crop_max_tokens": 8}))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_give_what_each_gives_alone(family):
    model, calls = tiny_model(family), requests(family)
    alone = [summary(generate(model, inputs, **options)) for inputs, options in calls]
    results: dict[int, list] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def work(thread: int) -> None:
        order = [(index + thread * 3) % len(calls) for index in range(len(calls))] * 3
        for index in order:
            barrier.wait(timeout=60)
            inputs, options = calls[index]
            try:
                results[thread].append((index, summary(generate(model, inputs, **options))))
            except Exception as error:
                results[thread].append((index, error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(thread,)) for thread in results]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    finally:
        sys.setswitchinterval(interval)
    for outcome in results.values():
        assert len(outcome) == 3 * len(calls)
        for index, result in outcome:
            assert not isinstance(result, Exception), result
            assert_same(result, alone[index])


def state(model) -> dict[str, object]:
    """Every attribute of every submodule; tensors and objects by identity, configurations by content."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            place = f"{name}.{key}"
            if isinstance(value, dict):
                found |= {f"{place}[{entry}]": id(item) for entry, item in value.items()}
                found[place] = len(value)
            elif hasattr(value, "to_dict"):
                found[place] = str(value.to_dict())
            elif isinstance(value, (str, int, float, bool, tuple, list, set, type(None))):
                found[place] = repr(value)
            else:
                found[place] = id(value)
    return found


def _text_turns(model, inputs: dict) -> None:
    first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    model.generate(input_ids=longer, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=2)


def _fused_training(model, inputs: dict) -> None:
    labels = inputs["input_ids"].clone()
    model(**inputs, labels=labels).loss.backward()
    model(**inputs, labels=labels, zoom_boxes=[(5, 6, 60, 70)] * len(labels)).loss.backward()
    model.zero_grad()


CALLS = {
    "zoomed": lambda model, long, short, text: generate(model, long, **ZOOM),
    "mixed": lambda model, long, short, text: generate(model, long, **AUTO),
    "never": lambda model, long, short, text: generate(model, long, zoom="never"),
    "text only": lambda model, long, short, text: generate(model, text),
    "text turns": lambda model, long, short, text: _text_turns(model, text),
    "sampling": lambda model, long, short, text: generate(model, long, do_sample=True, **ZOOM),
    "beams": lambda model, long, short, text: generate(model, short, num_beams=3, **ZOOM),
    "several answers": lambda model, long, short, text: generate(
        model, short, do_sample=True, num_return_sequences=2, **ZOOM
    ),
    "forward": lambda model, long, short, text: model(**plain_inputs(long)),
    "forward with a cache": lambda model, long, short, text: model(
        **plain_inputs(long), past_key_values=DynamicCache(config=model.config.get_text_config()), use_cache=True
    ),
    "forward of text": lambda model, long, short, text: model(**plain_inputs(text), use_cache=True),
    "forward of the branches": lambda model, long, short, text: model(
        **plain_inputs(short), region_targets=[torch.ones(1, 4, 4)], gate_targets=torch.ones(1)
    ),
    "forward over the fused sequence": lambda model, long, short, text: _fused_training(model, short),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_on_any_module(family, call):
    model = tiny_model(family)
    inputs = [make_inputs(family, rows) for rows in (LONG, SHORT, TEXT)]
    before = state(model)
    CALLS[call](model, *inputs)
    after = state(model)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    assert not changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_only_call_after_a_zoomed_one_is_unaffected(family):
    model, vlm = tiny_model(family), tiny_vlm(family)
    text = make_inputs(family, TEXT)
    generate(model, make_inputs(family, LONG), **ZOOM)
    after = generate(model, text)
    plain = vlm.generate(**text, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(after.sequences, plain.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after.logits, plain.logits))
    assert torch.equal(model(**text).logits, vlm(**text).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_text_turn_continues_from_the_cache(family):
    """The VLM keeps a position offset on itself for this; here it is not needed."""
    model, vlm = tiny_model(family), tiny_vlm(family)
    generate(model, make_inputs(family, SHORT), **ZOOM)
    text, results = make_inputs(family, TEXT), []
    for candidate in (model, vlm):
        first = candidate.generate(**text, max_new_tokens=3, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, first.sequences[:, -2:] + 1], dim=1)
        mask = torch.nn.functional.pad(text["attention_mask"], (0, 5), value=1)
        results.append(
            candidate.generate(
                input_ids=longer,
                attention_mask=mask,
                max_new_tokens=3,
                output_logits=True,
                return_dict_in_generate=True,
                **{CACHE: first.past_key_values},
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0].logits, results[1].logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hand_written_decoding_loop_is_the_plain_one(family):
    """Forward after forward with a cache and no positions, which the VLM infers from its own memory of the prompt."""
    model, vlm = tiny_model(family), tiny_vlm(family)
    inputs, other = plain_inputs(make_inputs(family, LONG[:1])), plain_inputs(make_inputs(family, SHORT))
    inputs.pop("attention_mask")
    logits = []
    for candidate in (model, vlm):
        output = candidate(**inputs, use_cache=True)
        if candidate is model:  # another request in between, which would overwrite that memory
            model(**other, use_cache=True)
        steps = [output.logits[:, -1]]
        for _ in range(3):
            token = steps[-1].argmax(-1, keepdim=True)
            output = candidate(input_ids=token, use_cache=True, **{CACHE: output.past_key_values})
            steps.append(output.logits[:, -1])
        logits.append(torch.stack(steps))
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_fails_half_way_leaves_nothing_behind(family, monkeypatch):
    model, inputs = tiny_model(family), make_inputs(family, LONG)
    expected, before = summary(generate(model, inputs, **ZOOM)), state(model)

    def broken(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decisions, "cut_crop", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model, inputs, **ZOOM)
    assert state(model) == before
    assert_same(summary(generate(model, inputs, **ZOOM)), expected)
