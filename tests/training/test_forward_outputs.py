"""`forward` and the feature methods return all that the VLM's do, and name missing images in its words."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from modeling_qzoom import InputError, QZoomOutput
from modeling_qzoom.backbone_cache_qzoom import CACHE
from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model, tiny_vlm


QWEN = ("qwen2_5_vl", "qwen3_vl")
ROWS = [Row(["first ", None, " which?"], [(2, 4)], 3), Row([None, " second ", None], [(3, 3), (1, 2)], 4)]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def assert_equal(ours, theirs) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, (tuple, list)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_equal(one, other)
    elif isinstance(theirs, ModelOutput):
        assert_equal(list(ours.values()), list(theirs.values()))


def test_every_field_of_the_vlm_is_passed_on(family):
    model, vlm, inputs = tiny_model(family), tiny_vlm(family), plain_inputs(make_inputs(family, ROWS))
    for options in ({}, {"labels": inputs["input_ids"]}, {"output_hidden_states": True}):
        ours, theirs = model(**inputs, **options), vlm(**inputs, **options)
        assert isinstance(ours, QZoomOutput) and list(ours.keys()) == list(theirs.keys())
        for name, value in theirs.items():
            assert_equal(ours[name], value)
            assert ours[name] is getattr(ours, name)
        assert_equal(model(**inputs, **options, return_dict=False), vlm(**inputs, **options, return_dict=False))


@dataclass
class _LaterOutput(CausalLMOutputWithPast):
    something_new: torch.Tensor | None = None


def test_a_field_that_a_later_vlm_adds_is_passed_on(family, monkeypatch):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS))
    forward, value = model.vlm.forward, torch.ones(2)
    monkeypatch.setattr(model.vlm, "forward", lambda **call: _LaterOutput(forward(**call).loss, something_new=value))
    assert model(**inputs).something_new is value


def test_outputs_are_taken_apart_and_built_again(family):
    """As DistributedDataParallel, DataParallel and other processes do."""
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS))
    for call in ({"use_cache": True}, {"gate_targets": torch.ones(2)}):
        output = model(**inputs, **call)
        leaves, structure = pytree.tree_flatten(output)
        for copy in (pytree.tree_unflatten(leaves, structure), type(output)(dict(output)), QZoomOutput(**output)):
            assert type(copy) is QZoomOutput and list(copy.keys()) == list(output.keys())
            for name, value in output.items():
                assert_equal(copy[name], value)
    detached = QZoomOutput(loss=torch.ones(()), gate_logits=torch.ones(2), something_new=torch.ones(3))
    copy = pickle.loads(pickle.dumps(detached))
    assert list(copy.keys()) == ["loss", "gate_logits", "something_new"]
    assert torch.equal(copy.something_new, detached.something_new)


def test_features_are_tuples_where_the_config_says_so(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS))
    call = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    whole = model.get_image_features(**call)
    assert isinstance(whole, ModelOutput)
    assert_equal(model.get_image_features(**call, return_dict=False), whole.to_tuple())
    model.config.return_dict = False
    assert_equal(model.get_image_features(**call), whole.to_tuple())
    assert isinstance(model.get_image_features(**call, return_dict=True), ModelOutput)
    assert isinstance(model(**inputs), tuple)


@pytest.mark.parametrize("family", QWEN)
def test_videos_are_encoded_as_by_the_vlm(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS[:1])
    call = {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}
    whole = model.vlm.get_video_features(**call, return_dict=True)
    assert_equal(model.get_video_features(**call), whole)
    assert_equal(model.get_video_features(**call, return_dict=False), whole.to_tuple())
    model.config.return_dict = False
    assert_equal(model.get_video_features(**call), whole.to_tuple())


def test_a_model_has_the_video_method_if_its_vlm_has(family):
    model = tiny_model(family)
    assert (
        hasattr(model, "get_video_features") == hasattr(model.vlm, "get_video_features") == FAMILY[family].takes_videos
    )
    assert model.get_encoder(modality="image") is model.vlm.get_encoder(modality="image")
    assert model.get_decoder() is model.vlm.get_decoder()


def plain_calls(model, inputs: dict):
    plain = plain_inputs(inputs)
    yield lambda: model(**plain)
    yield lambda: model(**plain, labels=inputs["input_ids"].clone())
    yield lambda: model.generate(**inputs, zoom="never", max_new_tokens=1)


def training_calls(model, inputs: dict):
    plain = plain_inputs(inputs)
    yield lambda: model(**inputs, labels=inputs["input_ids"].clone())
    yield lambda: model(**plain, gate_targets=torch.ones(2))
    yield lambda: model(**plain, region_targets=[torch.ones(1, 2, 2), [torch.ones(1, 2, 2)] * 2])


@pytest.mark.parametrize("surplus", [False, True], ids=["fewer", "more"])
def test_images_and_prompts_that_do_not_fit_are_called_so_as_the_vlm_does(family, surplus):
    model = tiny_model(family)
    prompts, images = (ROWS[:1] * 2, ROWS) if surplus else (ROWS, ROWS[:1] * 2)
    inputs, other = make_inputs(family, prompts), make_inputs(family, images)
    for name in ("pixel_values", "image_grid_thw", "source_images"):
        if name in inputs:
            inputs[name] = other[name]
    with pytest.raises(ValueError) as plain:
        model.vlm(**plain_inputs(inputs))
    for call in plain_calls(model, inputs):
        with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: ") as error:
            call()
        if FAMILY[family].has_budget:  # LLaVA counts features in another way
            assert str(error.value) == str(plain.value)
    # these know the rows, and name the place
    for call in training_calls(model, inputs):
        with pytest.raises(InputError, match=r"image tokens"):
            call()


@pytest.mark.parametrize("family", QWEN)
def test_image_tokens_in_more_stretches_than_images_are_named(family):
    """As many tokens as the images have, but text between them: positions run out of grids."""
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS[:1]))
    ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
    place = int((ids[0] == model.config.image_token_id).nonzero()[3])
    for tensor in (ids, kinds):
        tensor[0, : place + 1] = torch.cat([tensor[0, 1 : place + 1], tensor[0, :1]])
    for call in ({}, {"gate_targets": torch.ones(1)}):
        with pytest.raises(ValueError, match="more separate stretches|image tokens in a row"):
            model(**inputs, **call)


def test_text_beside_left_over_grids_is_no_mismatch():
    model, inputs = tiny_model("qwen2_5_vl"), plain_inputs(make_inputs("qwen2_5_vl", [Row(["words only"])]))
    grids = torch.tensor([[1, 4, 4]])
    assert torch.equal(model(**inputs, image_grid_thw=grids).logits, model.vlm(**inputs, image_grid_thw=grids).logits)


def test_the_cache_is_still_where_it_was(family):
    output = tiny_model(family)(**plain_inputs(make_inputs(family, ROWS)), use_cache=True)
    assert output.past_key_values is output[CACHE] is not None
