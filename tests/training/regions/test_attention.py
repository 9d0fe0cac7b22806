"""Response-to-image attention against the maps that eager attention returns."""

import pytest
import torch

from modeling_qzoom.asking.chats import encode_prompts, render, stack_features
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.session import open_session
from modeling_qzoom.training.regions.attention import response_maps
from modeling_qzoom.training.regions.config import QUERY_TOKENS
from modeling_qzoom.training.regions.heads import all_heads, check_heads
from modeling_qzoom.training.regions.look import look, share_images
from modeling_qzoom.training.regions.responses import Response, respond
from tests.families import FAMILY
from tests.processing_fixtures import noise
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model, tiny_vlm
from tests.training.stage_fixtures import budget, write_model


CLOSE = 1e-5
ROWS = [Row(["hi", None, "what is it?"], [(3, 4)], 1), Row(["hello there", None, "?"], [(2, 3)], 2)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family)


@pytest.fixture(scope="module")
def eager(family):
    vlm = tiny_vlm(family)
    vlm.set_attn_implementation("eager")
    return vlm


def _responses(model, inputs) -> list[Response]:
    """One that ended by itself after three tokens and one that was cut off after six."""
    first, second = respond(model, inputs, 6)
    return [Response(first.ids[:3], True), second]


@torch.no_grad()
def _expected(eager, inputs, response: Response, query_tokens: str) -> torch.Tensor:
    """(layers · heads, image tokens) by the definition, for one unpadded prompt."""
    prompt = inputs["input_ids"]
    ids = torch.cat([prompt, response.ids[None]], dim=1)
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = ids[0] == eager.config.image_token_id
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = image[None].int()
    layers = torch.stack(eager(**inputs, output_attentions=True).attentions)[:-1, 0]  # (L - 1, H, n, n)
    start, count = prompt.shape[1], len(response.ids)
    columns = {"before": range(start - 1, start + count - 1)}
    columns["response"] = range(start, start + count - (not response.ended))
    return layers[:, :, list(columns[query_tokens])][..., image].mean(2).flatten(0, 1)


@pytest.mark.parametrize("query_tokens", QUERY_TOKENS)
def test_maps_equal_those_of_eager_attention(family, model, eager, query_tokens) -> None:
    inputs = plain_inputs(make_inputs(family, ROWS))
    responses = _responses(model, inputs)
    maps = response_maps(model, inputs, responses, None, query_tokens)
    for row, response, found in zip(ROWS, responses, maps, strict=True):
        single = plain_inputs(make_inputs(family, [row]))
        assert found.shape[1:] == FAMILY[family].grids(*row.grids)[0]
        expected = _expected(eager, single, response, query_tokens)
        torch.testing.assert_close(found.flatten(1), expected, atol=CLOSE, rtol=0)


def test_a_batch_equals_its_rows_alone(family, model) -> None:
    inputs = plain_inputs(make_inputs(family, ROWS))
    assert (inputs["attention_mask"][1] == 0).any() or (inputs["attention_mask"][0] == 0).any()
    responses = _responses(model, inputs)
    together = response_maps(model, inputs, responses)
    for row, response, found in zip(ROWS, responses, together, strict=True):
        single = plain_inputs(make_inputs(family, [row]))
        torch.testing.assert_close(response_maps(model, single, [response])[0], found, atol=CLOSE, rtol=0)


def test_chosen_heads_come_by_layer_and_in_their_order(family, model) -> None:
    inputs = plain_inputs(make_inputs(family, ROWS[:1]))
    responses = respond(model, inputs, 3)
    whole = response_maps(model, inputs, responses)[0].unflatten(0, (5, 4))
    chosen = response_maps(model, inputs, responses, {3: [2, 0], 1: [3]})[0]
    torch.testing.assert_close(chosen, torch.stack([whole[1, 3], whole[3, 2], whole[3, 0]]), atol=CLOSE, rtol=0)


def test_layers_above_the_chosen_ones_do_not_run() -> None:
    model = tiny_model("qwen2_5_vl")
    inputs = plain_inputs(make_inputs("qwen2_5_vl", ROWS[:1]))
    responses = respond(model, inputs, 3)
    expected = response_maps(model, inputs, responses, {2: [1]})[0]
    for layer in range(2, 6):
        model.vlm.get_decoder().layers[layer].mlp = None
    torch.testing.assert_close(response_maps(model, inputs, responses, {2: [1]})[0], expected)


def test_responses_are_greedy_and_end_in_front_of_the_end_token(family, model, eager) -> None:
    inputs = plain_inputs(make_inputs(family, ROWS))
    free = respond(model, inputs, 6)
    assert [len(response.ids) for response in free] == [6, 6] and not any(response.ended for response in free)
    stop = int(free[0].ids[2])
    usual, model.generation_config.eos_token_id = model.generation_config.eos_token_id, stop
    try:
        first, second = respond(model, inputs, 6)
    finally:
        model.generation_config.eos_token_id = usual
    assert first.ended and first.ids.tolist() == free[0].ids[: free[0].ids.tolist().index(stop)].tolist()
    assert second.ended == (stop in free[1].ids.tolist())
    plain = eager.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert free[1].ids.tolist() == plain[1, -6:].tolist()


def test_an_empty_response_has_no_map_and_leaves_the_others_alone(family, model) -> None:
    inputs = plain_inputs(make_inputs(family, ROWS))
    responses = _responses(model, inputs)
    empty = Response(responses[0].ids[:0], True)
    maps = response_maps(model, inputs, [empty, responses[1]])
    assert maps[0] is None
    torch.testing.assert_close(maps[1], response_maps(model, inputs, responses)[1], atol=CLOSE, rtol=0)
    cut_off = Response(responses[0].ids[:1], False)
    assert response_maps(model, inputs, [cut_off, cut_off]) == [None, None]
    assert all(entry is not None for entry in response_maps(model, inputs, [cut_off, cut_off], None, "before"))


def test_wrong_heads_and_rows_are_refused() -> None:
    model = tiny_model("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"layer 6; the model has layers 0 to 5"):
        check_heads(model, {6: [0]})
    with pytest.raises(ValueError, match=r"\[4\] in layer 2; the model has heads 0 to 3"):
        check_heads(model, {2: [1, 4]})
    two = plain_inputs(make_inputs("qwen2_5_vl", [Row([None, "and", None], [(2, 2), (2, 3)])]))
    with pytest.raises(ValueError, match="exactly one image"):
        response_maps(model, two, respond(model, two, 3))
    one = plain_inputs(make_inputs("qwen2_5_vl", ROWS[:1]))
    with pytest.raises(ValueError, match="query_tokens must be one of"):
        response_maps(model, one, respond(model, one, 3), query_tokens="after")
    assert all_heads(model) == {layer: [0, 1, 2, 3] for layer in range(5)}


def test_shared_images_give_what_single_ones_give(family, tmp_path) -> None:
    config = ModelConfig(model=write_model(tmp_path, family), max_new_tokens=4, **budget(family))
    session = open_session(config)
    pictures = {"a": noise(150, 120, 1), "b": noise(90, 180, 2)}
    asked = [("b", "what?"), ("a", "how many are there?"), ("b", "who is it?")]
    features = [
        encode_prompts(session.processor, [pictures[name]], [render(session.processor, [(text, None)], config)])
        for name, text in asked
    ]
    names = [name for name, _ in asked]
    pad = session.processor.tokenizer.pad_token_id
    shared = share_images(session.model, features, names, pad)
    assert "pixel_values" not in shared
    plain = plain_inputs(stack_features(features, pad))
    responses = respond(session.model, shared, 4)
    assert [part.ids.tolist() for part in responses] == [
        part.ids.tolist() for part in respond(session.model, plain, 4)
    ]
    expected = response_maps(session.model, plain, responses, {1: [0], 3: [2]})
    looks = look(session, features, names, {1: [0], 3: [2]})
    for seen, single in zip(looks, expected, strict=True):
        torch.testing.assert_close(seen.attention, single, atol=CLOSE, rtol=0)
