"""Arguments of `forward`: obeyed or refused, and what wrappers pass along without setting it does not matter."""

import peft
import pytest
import torch

from tests.lora_support import needs_lora
from tests.tiny import FAMILIES, make_inputs, plain_inputs, tiny_model
from tests.training.test_forward_training import ROWS, draw_targets, right_padded


UNSET = {
    "output_attentions": None,
    "output_hidden_states": None,
    "output_router_logits": False,
    "use_cache": False,
    "logits_to_keep": 0,
    "decoder_input_ids": None,
    "return_dict": True,
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def passes(family: str, inputs: dict) -> dict[str, dict]:
    labels = inputs["input_ids"].clone()
    return {
        "plain": {"labels": labels},
        "fused": {"labels": labels, "source_images": inputs["source_images"]},
        "region": {"region_targets": draw_targets(family, ROWS)},
        "gate": {"gate_targets": torch.tensor([1, 0, 1, 1])},
    }


def test_what_is_not_set_is_not_refused(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    for call in passes(family, inputs).values():
        expected = model(**plain_inputs(inputs), **call).loss
        assert torch.equal(model(**plain_inputs(inputs), **call, **UNSET).loss, expected)
        assert torch.equal(model(**plain_inputs(inputs), **call, return_dict=False)[0], expected)


TASKS = [*(("qwen2_5_vl", task) for task in (None, "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"))]
TASKS += [(family, "CAUSAL_LM") for family in FAMILIES]


@needs_lora
@pytest.mark.parametrize("family, task", TASKS, indirect=["family"])
def test_every_kind_of_task_of_peft_trains(family, task):
    inputs = make_inputs(family, ROWS)
    bare, plain = tiny_model(family), plain_inputs(inputs)
    expected = {name: bare(**plain, **call).loss for name, call in passes(family, inputs).items()}
    recipe = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
    model = peft.get_peft_model(tiny_model(family), recipe)
    for name, call in passes(family, inputs).items():
        model.zero_grad()
        loss = model(**plain, **call).loss
        torch.testing.assert_close(loss, expected[name])  # a fresh adapter changes nothing
        loss.backward()
        reached = [key for key, part in model.named_parameters() if part.grad is not None and bool(part.grad.any())]
        assert reached and all("lora_" in key for key in reached)


@pytest.mark.parametrize("name", ["use_cache", "output_attentions", "output_hidden_states", "shift_labels"])
def test_what_a_training_pass_cannot_do_is_refused(name):
    model, inputs = tiny_model("qwen3_vl"), make_inputs("qwen3_vl", ROWS)
    value = torch.ones(4, 4).long() if name == "shift_labels" else True
    for kind, call in passes("qwen3_vl", inputs).items():
        if kind == "plain":
            continue
        with pytest.raises(ValueError, match=rf"does not take \['{name}'\]"):
            model(**plain_inputs(inputs), **call, **{name: value})
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**plain_inputs(inputs), **passes("qwen3_vl", inputs)["fused"], logits_to_keep=2)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("region_target", "region_targets"),
        ("gates_targets", "gate_targets"),
        ("query_position", "query_positions"),
        ("source_image", "source_images"),
        ("source_box", "source_boxes"),
        ("zoom_bboxes", "zoom_boxes"),
    ],
)
def test_close_misses_of_our_arguments_are_named(family, name, meant):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    for call in passes(family, inputs).values():
        with pytest.raises(ValueError, match=f"no argument '{name}'; is it a misspelt '{meant}'"):
            model(**plain_inputs(inputs), **call, **{name: torch.ones(1)})
        model(**plain_inputs(inputs), **call, **{name: None})


@pytest.mark.parametrize("name, value", [("zoom", "always"), ("crop_max_tokens", 4), ("gate_treshold", 0.5)])
def test_options_of_generate_are_not_taken_by_forward(name, value):
    model, inputs = tiny_model("llava"), plain_inputs(make_inputs("llava", ROWS))
    with pytest.raises(ValueError, match=f"'{name}' is no argument of forward.*generation_config"):
        model(**inputs, **{name: value})


def test_arguments_of_another_pass_are_refused(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    plain, calls = plain_inputs(inputs), passes(family, inputs)
    boxes = [(0, 0, 40, 40), None, None, None]
    for call in ({}, calls["region"], calls["gate"]):
        with pytest.raises(ValueError, match="zoom_boxes .* with labels only"):
            model(**plain, **call, zoom_boxes=boxes)
    columns = torch.zeros(4, 1).long()
    for call in ({}, calls["plain"], calls["fused"]):
        with pytest.raises(ValueError, match="query_positions say where the branches are asked"):
            model(**plain, **call, query_positions=columns)


def test_other_arguments_reach_the_vlm(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS[:1]))
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(model.vlm.get_decoder().layers) + 1


def test_sources_beside_no_labels_change_nothing(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    boxes = [[0, 0, 50, 50]] * len(inputs["source_images"])
    for call in ({}, passes(family, inputs)["gate"]):
        with_sources = model(**inputs, **call, source_boxes=boxes)
        for name, value in model(**plain_inputs(inputs), **call).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(with_sources[name], value)


def test_boxes_that_are_no_boxes_are_named():
    model, inputs = tiny_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", ROWS[:1])
    with pytest.raises(ValueError, match="row 0 holds .* four numbers"):
        model(**inputs, labels=inputs["input_ids"], zoom_boxes=[(1, 2, 3)])


def test_targets_may_be_booleans(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS[:2]))
    end = inputs["input_ids"].shape[1] - 1
    columns = torch.tensor([[end, end - 1], [-1, end]])
    maps = [[part != 0 for part in row] for row in draw_targets(family, ROWS[:2], queries=2)]
    flags = torch.tensor([True, False])
    booleans = model(**inputs, region_targets=maps, gate_targets=flags, query_positions=columns)
    numbers = model(
        **inputs,
        region_targets=[[part.float() for part in row] for row in maps],
        gate_targets=flags.float(),
        query_positions=columns,
    )
    assert torch.equal(booleans.region_loss, numbers.region_loss)
    assert torch.equal(booleans.gate_loss, numbers.gate_loss)


def test_right_padded_rows_have_the_loss_of_left_padded_ones(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS))
    losses = []
    for batch in (inputs, right_padded(inputs)):
        # on the left, a pad would predict a row's first token, which nothing predicts on the right
        later = batch["attention_mask"].cumsum(1) * batch["attention_mask"] > 1
        losses.append(model(**batch, labels=batch["input_ids"].masked_fill(~later, -100)).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
