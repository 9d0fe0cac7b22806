"""`read_page` and `generate(…, page=…)`: what they return, and what they refuse."""

import copy

import pytest
import torch

from modeling_qzoom import InputError, Page, UnsupportedError
from tests.families import FAMILY
from tests.lora_support import needs_lora
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


families = pytest.mark.parametrize("family", FAMILIES)
OPTIONS = {"zoom": "auto", "gate_threshold": 2, "max_new_tokens": 2}


def rows(*questions: str, seed: int = 1, before: str = "see ") -> list[Row]:
    return [Row([before, None, question], [(3, 4)], seed) for question in questions]


def ask(model, inputs: dict, page, **options) -> torch.Tensor:
    return model.generate(**inputs, **{**OPTIONS, **options}, page=page)


@pytest.fixture(params=FAMILIES)
def read(request):
    """(family, model, page)."""
    model = tiny_model(request.param)
    return request.param, model, model.read_page(**make_inputs(request.param, rows("what?")))


def test_what_a_page_says_of_itself(read):
    family, model, page = read
    ids = make_inputs(family, rows(""))["input_ids"][0]
    image = int((ids == model.config.image_token_id).nonzero()[-1, 0]) + 1 + FAMILY[family].markers // 2
    assert isinstance(page, Page) and page.tokens == image and page.device == model.device
    assert repr(page).startswith(f"Page({image} tokens, 1 image, ") and page.nbytes > 0
    both = model.read_page(**make_inputs(family, [Row(["a", None, "b", None], [(3, 4), (2, 3)], 1)]))
    assert "2 images" in repr(both) and both.nbytes > page.nbytes


def test_what_follows_the_last_image_is_not_part_of_a_page(read):
    family, model, page = read
    other = model.read_page(**make_inputs(family, rows("a much longer question than the first one")))
    assert torch.equal(other.beginning.input_ids, page.beginning.input_ids)
    torch.testing.assert_close(other.hidden, page.hidden)


def test_a_copy_of_a_page_is_as_good(read):
    family, model, page = read
    inputs = make_inputs(family, rows("why?"))
    assert torch.equal(ask(model, inputs, copy.deepcopy(page)), ask(model, inputs, page))


def test_later_turns_of_a_chat_continue_from_their_page(read):
    family, model, page = read
    inputs = make_inputs(family, [Row(["see ", None, "what? this. and that?"], [(3, 4)], 1)])
    assert torch.equal(ask(model, inputs, page), ask(model, inputs, None))


@families
@pytest.mark.parametrize(
    "row, cause",
    [
        (Row(["look ", None, "?"], [(3, 4)], 1), "first 0 agree|first 1 agree"),
        (Row(["see ", None, "?"], [(3, 4)], 2), "its image has other pixel values"),
        (Row(["no image at all"]), "does not start with the page"),
        (Row(["s"]), "does not start with the page"),
    ],
)
def test_a_prompt_that_does_not_begin_with_its_page_is_refused(family, row, cause):
    model = tiny_model(family)
    page = model.read_page(**make_inputs(family, rows("what?")))
    inputs = make_inputs(family, [*rows("what?"), row])
    with pytest.raises(InputError, match=f"^row 1 .*({cause})"):
        ask(model, inputs, page)
    assert ask(model, inputs, [page, None]) is not None


def test_hidden_tokens_of_a_page_are_refused(read):
    family, model, page = read
    inputs = make_inputs(family, rows("what?", "why?"))
    inputs["attention_mask"][1, 1] = 0
    with pytest.raises(InputError, match="row 1 does not start with the page"):
        ask(model, inputs, page)
    single = make_inputs(family, rows("what?"))
    single["attention_mask"][0, 1] = 0
    with pytest.raises(InputError, match="hides tokens in front of the last image's end"):
        model.read_page(**single)


def test_a_page_of_another_model_or_state_is_refused(read):
    family, model, page = read
    inputs = make_inputs(family, rows("why?"))
    with pytest.raises(InputError, match="read by another model"):
        ask(tiny_model(family), inputs, page)
    with torch.no_grad():
        model.vlm.get_decoder().layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(InputError, match="before its weights were changed.*read_page"):
        ask(model, inputs, page)
    page = model.read_page(**inputs)
    model.load_state_dict(model.state_dict())
    with pytest.raises(InputError, match="before its weights were changed"):
        ask(model, inputs, page)
    page = model.read_page(**inputs)
    model.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"in torch.float32, which runs in torch.bfloat16 now"):
        ask(model, inputs, page)


def test_half_precision(read):
    family, model, _ = read
    model.to(torch.bfloat16)
    inputs = make_inputs(family, rows("why?"))
    page = model.read_page(**inputs)
    assert page.hidden.dtype == torch.bfloat16
    for pixels in (inputs["pixel_values"], inputs["pixel_values"].to(torch.bfloat16)):
        assert ask(model, {**inputs, "pixel_values": pixels}, page) is not None


@pytest.mark.parametrize("page", ["page", 3, {"page": 1}, ["page"]])
def test_what_is_no_page_is_refused(page):
    model = tiny_model(FAMILIES[0])
    with pytest.raises(InputError, match="^page must be what model.read_page returned"):
        ask(model, make_inputs(FAMILIES[0], rows("what?")), page)


def test_the_number_of_pages(read):
    family, model, page = read
    inputs = make_inputs(family, rows("what?", "why?"))
    with pytest.raises(InputError, match="page holds 1 pages, the batch 2 rows"):
        ask(model, inputs, [page])
    assert torch.equal(ask(model, inputs, [None, None]), ask(model, inputs, None))


def test_without_pixels_or_ids_nothing_is_recognised(read):
    family, model, page = read
    inputs = make_inputs(family, rows("what?"))
    encoded = model.get_image_features(inputs["pixel_values"], inputs.get("image_grid_thw"))
    kept = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(InputError, match="pixel_values"):
        ask(model, {**kept, "mm_encoder_outputs": {"image": encoded}}, page)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match="from input_ids only"):
        model.generate(inputs_embeds=embeds, page=page, **OPTIONS)


def test_what_read_page_refuses(read):
    family, model, _ = read
    two = make_inputs(family, rows("what?", "why?"))
    with pytest.raises(InputError, match="reads one prompt, got 2 rows"):
        model.read_page(**two)
    one = make_inputs(family, rows("what?"))
    text = make_inputs(family, [Row(["text only"])])
    with pytest.raises(InputError, match="no image"):
        model.read_page(**text)
    with pytest.raises(InputError, match="pixel_values is missing"):
        model.read_page(**{name: value for name, value in one.items() if name != "pixel_values"})
    with pytest.raises(InputError, match="takes no max_new_tokens, zoom; options of zooming belong to `generate`"):
        model.read_page(**one, zoom="always", max_new_tokens=3)
    with pytest.raises(InputError, match="gate_branch"):
        model.read_page(**one, gate_branch="thin")
    right = {**one, "attention_mask": one["attention_mask"].clone()}
    right["attention_mask"][0, -1] = 0
    with pytest.raises(InputError, match="padded on the right"):
        model.read_page(**right)


def test_what_cannot_go_with_a_page_names_both_ways_out(read):
    family, model, page = read
    inputs = make_inputs(family, rows("what?"))
    with pytest.raises(UnsupportedError, match="without a page the plain model decides"):
        ask(model, inputs, page, prompt_lookup_num_tokens=2)


def test_positions_of_the_callers_own(read):
    """They may differ from row to row, and from those that the page was read at."""
    family, model, page = read
    inputs = make_inputs(family, rows("what?", "what?"))
    plain = inputs["attention_mask"].cumsum(1) - 1
    positions = torch.stack([plain[0], 2 * plain[1]])
    positions = positions.expand(4, -1, -1) if model.config.backbone.mrope else positions
    with pytest.raises(UnsupportedError, match="leave position_ids out"):
        ask(model, inputs, page, position_ids=positions)
    options = {"position_ids": positions, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    own = ask(model, inputs, None, **options).logits[0]
    torch.testing.assert_close(own, ask(model, inputs, None, skip_unread=False, **options).logits[0])
    assert (own[0] - own[1]).abs().max() > 1e-3


def test_no_sources_are_needed_where_nothing_zooms(read):
    family, model, page = read
    inputs = plain_inputs(make_inputs(family, rows("what?", "why?")))
    assert torch.equal(ask(model, inputs, page, zoom="never"), ask(model, inputs, None, zoom="never"))


@needs_lora
def test_adapters(read):
    from peft import LoraConfig, get_peft_model

    family, model, page = read
    inputs = make_inputs(family, rows("what?", "why?"))
    config = LoraConfig(target_modules=r".*language_model.*\.q_proj", r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="first").eval()
    adapted.add_adapter("second", config)
    with pytest.raises(InputError, match="with other adapters"):
        ask(adapted, inputs, page)
    adapted.set_adapter("first")
    page = adapted.read_page(**make_inputs(family, rows("what?")))
    assert torch.equal(ask(adapted, inputs, page), ask(adapted, inputs, None))
    with pytest.raises(UnsupportedError, match="every row layers of its own"):
        ask(adapted, inputs, page, adapter_names=["first", "second"])
    with adapted.disable_adapter(), pytest.raises(InputError, match="with other adapters"):
        ask(adapted, inputs, page)
    assert ask(adapted, inputs, page) is not None
    adapted.set_adapter("second")
    with pytest.raises(InputError, match="with other adapters"):
        ask(adapted, inputs, page)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILY[name].takes_videos])
def test_prompts_with_videos_are_refused(family):
    model = tiny_model(family)
    page = model.read_page(**make_inputs(family, rows("what?")))
    inputs = make_inputs(family, rows("what?"))
    video = FAMILY[family].video_text(1, 4)
    texts = make_inputs(family, [Row(["see ", None, video, "?"], [(3, 4)], 1)])
    grid = FAMILY[family].spec.grid.of(model.config.vlm_config)
    patches = torch.zeros(4 * grid.merge**2, inputs["pixel_values"].shape[1])
    texts |= {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[1, 2 * grid.merge, 2 * grid.merge]])}
    with pytest.raises(UnsupportedError, match="prompts with videos"):
        ask(model, texts, page)
    with pytest.raises(UnsupportedError, match="only images can be read ahead"):
        model.read_page(**texts)
