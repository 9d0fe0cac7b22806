import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor, Qwen2VLImageProcessor

from modeling_qzoom import QZoomProcessor
from tests.families import FAMILY
from tests.processing_fixtures import (
    PROCESSORS,
    chat,
    llava_processor,
    noise,
    process,
    qwen3_processor,
    qwen_processor,
)
from tests.tiny import qwen_tokenizer


families = pytest.mark.parametrize("family", list(PROCESSORS))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def token_counts(processor, inputs) -> list[int]:
    return (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()


@families
def test_batch_of_chats(family):
    processor = PROCESSORS[family]()
    images = [noise(112, 84), noise(224, 112, 1), noise(60, 300, 2)]
    inputs = process(processor, [chat(images[0], "hi"), chat("text only"), chat("a", images[1], "b", images[2])])
    assert [source.shape for source in inputs["source_images"]] == [(3, 84, 112), (3, 112, 224), (3, 300, 60)]
    for source, image in zip(inputs["source_images"], images, strict=True):
        assert source.dtype == torch.uint8 and torch.equal(source, as_tensor(image))
    floats = [key for key, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()]
    assert floats == ["pixel_values"]
    assert set(inputs) <= set(processor.model_input_names)
    has_boxes = FAMILY[family].fixed_grid is not None
    assert ("source_boxes" in inputs) == ("source_boxes" in processor.model_input_names) == has_boxes
    # left padding: every row ends with the prompt's last token
    mask = inputs["attention_mask"]
    assert mask[:, -1].all() and not mask[1, 0] and (mask.diff(dim=1) >= 0).all()
    expected = [12, 0, (inputs["image_grid_thw"][1:].prod(1) // 4).sum().item()] if not has_boxes else [16, 0, 32]
    assert token_counts(processor, inputs) == expected


@families
def test_equals_the_backbones_own_processor(family):
    processor = PROCESSORS[family]()
    chats = [chat(noise(112, 84), "hi"), chat(noise(50, 90), "and a longer question")]
    inputs = process(processor, chats)
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    images = [turn["content"][0]["image"] for turns in chats for turn in turns]
    stock = processor.backbone_processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert set(inputs) - set(stock) == {"source_images"} | (
        {"source_boxes"} if not FAMILY[family].has_budget else set()
    )
    assert all(torch.equal(inputs[key], stock[key]) for key in stock)


@families
def test_text_alone_and_images_alone(family):
    processor = PROCESSORS[family]()
    text_only = processor(text="plain")
    assert "pixel_values" not in text_only and "source_images" not in text_only
    assert text_only["input_ids"].shape[0] == 1
    images_only = processor(images=[noise(56, 56)])
    assert "input_ids" not in images_only and len(images_only["source_images"]) == 1
    for empty in ([], [[]]):
        assert "source_images" not in processor(images=empty, text=["plain"])


def test_every_way_to_give_an_image(tmp_path):
    processor = qwen_processor()
    image = noise(84, 56)
    image.save(tmp_path / "page.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    array = np.array(image)
    parts = [
        {"image": image},
        {"image": array},
        {"image": torch.from_numpy(array).permute(2, 0, 1)},
        {"path": str(tmp_path / "page.png")},
        {"url": str(tmp_path / "page.png")},
        {"base64": base64.b64encode(buffer.getvalue()).decode()},
    ]
    for part in parts:
        message = {"role": "user", "content": [{"type": "image", **part}]}
        inputs = process(processor, [message])
        assert torch.equal(inputs["source_images"][0], as_tensor(image))
    openai = {"type": "image_url", "image_url": {"url": str(tmp_path / "page.png")}}
    assert len(process(processor, [{"role": "user", "content": [openai]}])["source_images"]) == 1


@families
def test_coarse_view_and_source_show_the_same_upright_picture(family):
    # two thirds of it are transparent black, it lies on its side, and the tag says so
    picture = Image.new("RGBA", (56, 168), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 56, 56))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    flattened = Image.new("RGB", (168, 56), "white")
    flattened.paste((255, 0, 0), (112, 0, 168, 56))
    processor = PROCESSORS[family]()
    token = processor.image_token
    inputs, expected = (processor(images=[image], text=token) for image in (buffer.getvalue(), flattened))
    assert torch.equal(inputs["source_images"][0], as_tensor(flattened))
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_return_tensors():
    processor = qwen_processor()
    text, images = [processor.image_token, "longer than one token"], [noise(56, 56)]
    assert torch.is_tensor(processor(images=images, text=text)["input_ids"])
    lists = processor(images=images, text=text, return_tensors=None)
    assert isinstance(lists["input_ids"], list) and len({len(row) for row in lists["input_ids"]}) == 2
    arrays = processor(images=images, text=text, return_tensors="np")
    assert isinstance(arrays["pixel_values"], np.ndarray)
    assert lists["source_images"][0].dtype == arrays["source_images"][0].dtype == torch.uint8
    chats = [chat(images[0], "hi")]
    assert torch.is_tensor(process(processor, chats, return_tensors="pt")["input_ids"])
    assert isinstance(processor.apply_chat_template(chats, tokenize=False)[0], str)
    assert processor.apply_chat_template(chats, tokenize=True).shape[0] == 1


def test_moving_keeps_the_sources_whole():
    inputs = process(qwen_processor(), [chat(noise(56, 84), "hi"), chat(noise(84, 56), "hi")])
    moved = inputs.to("cpu", dtype=torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert all(source.dtype == torch.uint8 for source in moved["source_images"])
    assert moved["input_ids"].dtype == torch.int64


def test_assistant_masks_survive_ragged_sources():
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|image_pad|>{% elif m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}{% endgeneration %}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = qwen_processor(chat_template=template)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    chats = [[*chat(noise(56, 84), "really?"), answer], [*chat(noise(84, 140), "?"), answer]]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    for ids, mask in zip(inputs["input_ids"], torch.as_tensor(inputs["assistant_masks"]), strict=True):
        assert processor.decode(ids[mask.bool()]) == "yes"
    assert len(inputs["source_images"]) == 2


@pytest.mark.parametrize(("build", "side"), [(qwen_processor, 28), (qwen3_processor, 32)])
def test_budget_in_tokens(build, side):
    image = noise(10 * side, 10 * side)
    processor = build(min_tokens=4, max_tokens=25)
    token = processor.image_token
    assert token_counts(processor, processor(images=[image], text=token)) == [25]
    assert token_counts(processor, processor(images=[image], text=token, max_tokens=64)) == [64]
    assert token_counts(processor, processor(images=[image], text=token, min_tokens=169)) == [169]
    small = processor(images=[noise(side, side)], text=token)
    assert token_counts(processor, small) == [4]
    # a bound beyond the configured other one moves that too
    tiniest = processor(images=[noise(side, side)], text=token, max_tokens=1)
    assert token_counts(processor, tiniest) == [1]
    assert small["source_images"][0].shape == (3, side, side)
    chats = [chat(image, "hi")]
    assert token_counts(processor, process(processor, chats, max_tokens=9)) == [9]
    assert token_counts(processor, process(processor, chats, processor_kwargs={"max_tokens": 9})) == [9]
    assert processor._get_num_multimodal_tokens([(10 * side, 10 * side)])["num_image_tokens"] == [25]
    assert processor._get_num_multimodal_tokens([(side, side)])["num_image_tokens"] == [4]


def test_no_budget_means_as_configured():
    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 9 * 28 * 28})
    processor = QZoomProcessor(images, qwen_tokenizer())
    assert token_counts(processor, processor(images=[noise(280, 280)], text=processor.image_token)) == [9]
    assert processor._get_num_multimodal_tokens([(280, 280)])["num_image_tokens"] == [9]
    size = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    for given in ({"size": size}, {"images_kwargs": {"size": size}}):
        for one in (processor, qwen_processor(max_tokens=4)):  # an explicit size wins
            assert token_counts(one, one(images=[noise(280, 280)], text=one.image_token, **given)) == [16]
    with pytest.raises(ValueError, match="give one"):
        processor(images=[noise(280, 280)], text=processor.image_token, size=size, max_tokens=4)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"min_tokens": 0}, "min_tokens must be a positive number"),
        ({"max_tokens": 2.5}, "max_tokens must be a positive number"),
        ({"max_tokens": True}, "max_tokens must be a positive number"),
        ({"max_tokens": np.float32(9)}, "max_tokens must be a positive number"),
        ({"min_tokens": 9, "max_tokens": 4}, r"min_tokens \(9\) is larger than max_tokens \(4\)"),
    ],
)
def test_bad_budgets(budget, message):
    with pytest.raises(ValueError, match=message):
        qwen_processor(**budget)
    with pytest.raises(ValueError, match=message):
        qwen_processor()(text="hi", **budget)


def test_budgets_may_be_numpy_integers():
    processor = qwen_processor(max_tokens=np.int64(9))
    assert type(processor.max_tokens) is int and json.loads(processor.to_json_string())["max_tokens"] == 9
    image, token = noise(280, 280), processor.image_token
    assert token_counts(processor, processor(images=[image], text=token)) == [9]
    assert token_counts(processor, processor(images=[image], text=token, max_tokens=np.int32(16))) == [16]


def test_llava_has_no_budget():
    with pytest.raises(ValueError, match="one fixed token grid"):
        llava_processor(max_tokens=100)
    with pytest.raises(ValueError, match="one fixed token grid"):
        llava_processor()(text="hi", min_tokens=4)


def llava_boxes(image_processor, *images, **kwargs) -> list[list[int]]:
    processor = llava_processor(image_processor)
    boxes = processor(images=list(images), text=processor.image_token * len(images), **kwargs)["source_boxes"]
    assert boxes.dtype == torch.int64 and boxes.shape == (len(images), 4)
    return boxes.tolist()


def test_llava_centre_crop_covers_the_central_square():
    assert llava_boxes(None, noise(112, 84), noise(60, 300)) == [[14, 0, 98, 84], [0, 120, 60, 180]]
    assert llava_boxes(None, noise(112, 84), do_center_crop=False, size={"height": 56, "width": 56}) == [
        [0, 0, 112, 84]
    ]


def test_llava_padding_covers_more_than_the_image():
    padding = LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_center_crop=True
    )
    assert llava_boxes(padding, noise(112, 84), noise(60, 300)) == [[0, -14, 112, 98], [-120, 0, 180, 300]]
    assert llava_boxes(padding, noise(112, 84), images_kwargs={"do_pad": False}) == [[14, 0, 98, 84]]


@pytest.mark.parametrize("do_pad", [True, False])
def test_llava_box_is_where_the_pixels_are(do_pad):
    """A lit block of the source shows up in the coarse view where the rectangle says."""
    image_processor = LlavaImageProcessor(
        do_pad=do_pad, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    image_processor.image_mean, image_processor.image_std = [0.0] * 3, [1.0] * 3  # pixels as they are
    source = Image.new("RGB", (224, 112))
    source.paste((255, 255, 255), (96, 32, 112, 48))
    processor = llava_processor(image_processor)
    inputs = processor(images=[source], text=processor.image_token)
    x0, y0, x1, y1 = inputs["source_boxes"][0].tolist()
    lit = inputs["pixel_values"][0].min(0).values > 0.9  # padding is black
    rows, columns = torch.nonzero(lit, as_tuple=True)
    assert x0 + (columns.min() + columns.max() + 1) / 2 * (x1 - x0) / 56 == pytest.approx(104, abs=3)
    assert y0 + (rows.min() + rows.max() + 1) / 2 * (y1 - y0) / 56 == pytest.approx(40, abs=3)


@families
@pytest.mark.parametrize(
    "name",
    ["zoom", "effort", "gate_threshold", "region_threshold", "region_threshold_mode", "crop_min_tokens"]
    + ["crop_budget", "crop_target_tokens", "region_blur", "region_min_peak", "region_min_contrast"]
    + ["crop_max_tokens", "position_alignment", "return_zoom_reports", "max_new_tokens", "do_sample", "num_beams"]
    + ["temperature", "top_p", "streamer", "stopping_criteria"],
)
def test_keywords_of_generate_are_sent_there(family, name):
    processor = PROCESSORS[family]()
    message = rf"{name}: for `generate`.*generate_kwargs=\{{'{name}'"
    with pytest.raises(ValueError, match=message):
        processor(text="hi", **{name: 1})
    for more in ({name: 1}, {name: 1, "tokenize": True, "return_dict": True}):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat("hi"), **more)
    with pytest.raises(ValueError, match=message):
        process(processor, chat("hi"), processor_kwargs={name: 1})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_token": 3}, r"'max_token' \(did you mean max_tokens"),
        ({"qwertz": 3}, r"does not know the keyword 'qwertz'\."),
        ({"text_kwargs": {"paddin": True}}, r"'paddin' \(did you mean padding"),
        ({"images_kwargs": {"sise": 1}}, r"'sise' \(did you mean"),
        ({"common_kwargs": {"padding": True}}, "'padding'"),
        ({"max_pixels": 3}, "use min_tokens and max_tokens"),
        ({"images_kwargs": {"min_pixels": 3}}, "use min_tokens and max_tokens"),
        ({"do_rescale": False}, "do_rescale=False is not possible"),
        ({"do_normalize": False}, r"do_normalize: .*Only the coarse view.*model\.config\.image_mean"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "image_mean, image_std: not possible for one call"),
        ({"images_kwargs": {"image_std": (1.0, 1.0, 1.0)}}, "image_std: not possible for one call"),
        ({"images_kwargs": {"resample": 0}}, "resample: not possible for one call"),
        ({"padding_side": "centre"}, "padding_side must be 'left' or 'right', got 'centre'"),
        ({"text_kwargs": {"padding_side": True}}, "padding_side must be 'left' or 'right', got True"),
        ({"audio": [0.0]}, "takes no audio"),
    ],
)
def test_refused_keywords(keywords, message):
    with pytest.raises(ValueError, match=message):
        qwen_processor()(text="hi", **keywords)


def test_unknown_keyword_beside_a_chat():
    with pytest.raises(ValueError, match=r"does not know the keyword 'max_tokns' \(did you mean max_tokens"):
        qwen_processor().apply_chat_template(chat("hi"), max_tokns=1)
    # a variable of the template is no keyword of the processor
    greeting = "{{ greeting }}{{ messages[0]['content'][0]['text'] }}"
    assert qwen_processor().apply_chat_template(chat("hi"), greeting, greeting="oh ") == "oh hi"
    # words of a template shadow no option
    prose = "You may zoom, within max_tokens. <|image_pad|>"
    with pytest.raises(ValueError, match="zoom: for `generate`"):
        qwen_processor().apply_chat_template(chat("hi"), prose, zoom="always")
    processor = qwen_processor()
    assert token_counts(processor, process(processor, chat(noise(280, 280)), chat_template=prose, max_tokens=9)) == [9]


def test_known_keywords_reach_the_backbone():
    processor = qwen_processor()
    flat = processor(text=["a", "bbb"], padding="max_length", max_length=9, add_special_tokens=False)
    nested = processor(
        text=["a", "bbb"],
        text_kwargs={"padding": "max_length", "max_length": 9},
        common_kwargs={"return_tensors": "pt"},
    )
    beside = processor.apply_chat_template([chat("a"), chat("b")], tokenize=True, padding="max_length", max_length=99)
    assert flat["input_ids"].shape == nested["input_ids"].shape == (2, 9)
    assert torch.equal(flat["input_ids"], nested["input_ids"]) and beside.shape == (2, 99)
    assert "mm_token_type_ids" not in processor(text="a", return_mm_token_type_ids=False)
    ambiguous = np.random.default_rng(0).integers(0, 256, (3, 56, 3), dtype=np.uint8)
    inputs = processor(images=[ambiguous], text=processor.image_token, input_data_format="channels_last")
    assert inputs["source_images"][0].shape == (3, 3, 56)


def test_left_padding_whatever_the_tokenizer_says():
    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "right"
    processor = QZoomProcessor(Qwen2VLImageProcessor(), tokenizer)
    assert processor.tokenizer.padding_side == "left"
    processor.tokenizer.padding_side = "right"
    mask = processor(text=["a", "bbb"], padding_side="left")["attention_mask"]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
