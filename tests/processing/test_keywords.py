"""Keywords and settings: obeyed or refused, never passed over; the tokenizer's saved defaults; template variables."""

import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.utils import logging as transformers_logging

from modeling_qzoom import QZoomProcessor
from tests.families import FAMILY
from tests.processing_fixtures import (
    LLAVA_ARGUMENTS,
    PROCESSORS,
    chat,
    llava_processor,
    noise,
    process,
    qwen3_processor,
    qwen_processor,
)
from tests.tiny import llava_tokenizer, qwen_tokenizer, tiny_model


families = pytest.mark.parametrize("family", list(PROCESSORS))
qwens = pytest.mark.parametrize("build", [qwen_processor, qwen3_processor])
MEANS = (0.48145466, 0.4578275, 0.40821073)


def run(processor, *images, **keywords):
    images = images or (noise(112, 84),)
    return processor(images=list(images), text=[processor.image_token] * len(images), **keywords)


@families
def test_rows_are_padded_where_the_call_says(family):
    processor = PROCESSORS[family]()
    chats = [chat(noise(56, 56), "a"), chat(noise(56, 56), "a longer question")]
    left = process(processor, chats)["attention_mask"]
    assert not left[0, 0] and left[:, -1].all()
    for given in ({"padding_side": "right"}, {"processor_kwargs": {"text_kwargs": {"padding_side": "right"}}}):
        right = process(processor, chats, **given)
        assert right["attention_mask"][:, 0].all() and not right["attention_mask"][0, -1]
        assert torch.equal(right["attention_mask"].flip(1), left)
    assert torch.equal(process(processor, chats)["attention_mask"], left)  # nothing of it stays
    assert torch.equal(process(processor, chats, padding_side=None)["attention_mask"], left)


@families
def test_training_takes_rows_padded_on_the_right_and_generation_does_not(family):
    budget = FAMILY[family].budget(4, 24)
    processor, model = PROCESSORS[family](**budget), tiny_model(family)
    chats = [chat(noise(90, 120, 1), "a"), chat(noise(120, 90, 2), "a longer question")]
    losses = []
    for side in ("left", "right"):
        inputs = process(processor, chats, padding_side=side)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        boxes = [(0, 0, 60, 60), None]
        losses.append(model(**inputs, labels=labels, zoom_boxes=boxes).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match=r"rows \[0\] are padded on the right"):
        model.generate(**inputs, max_new_tokens=1)


@qwens
@pytest.mark.parametrize(
    "keywords",
    [
        {"do_center_crop": True},
        {"crop_size": {"height": 28, "width": 28}},
        {"do_pad": True},
        {"pad_size": {"height": 280, "width": 280}},
        {"default_to_square": True},
        {"image_seq_length": 9},
        {"images_kwargs": {"do_center_crop": True}},
    ],
)
def test_keywords_that_qwen_does_not_read(build, keywords):
    with pytest.raises(ValueError, match="would have no effect"):
        run(build(), **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"crop_size": 56, "do_center_crop": False}, "crop_size=56 would have no effect without do_center_crop=True"),
        ({"size": 56, "do_resize": False}, "size=56 would have no effect without do_resize=True"),
        ({"pad_size": {"height": 280, "width": 280}}, "pad_size=.* would have no effect"),
        ({"do_pad": True}, "do_pad of CLIPImageProcessor.* is not a padding to a square"),
        ({"fps": 2}, "does not know the keyword 'fps'"),
        ({"videos_kwargs": {"num_frames": 2}}, "'num_frames'"),
        (
            {"do_resize": False, "do_center_crop": False},
            "image 0 has a coarse view of 112 × 84 pixels.* square grid of whole patches",
        ),
        ({"crop_size": 50}, "a coarse view of 50 × 50 pixels"),
        ({"do_center_crop": False}, "image 0 has a coarse view of 74 × 56 pixels"),
    ],
)
def test_keywords_that_llava_does_not_obey(keywords, message):
    with pytest.raises(ValueError, match=message):
        run(llava_processor(), noise(112, 84), noise(28, 140), **keywords)


def test_settings_that_say_what_is_done_anyway():
    for build in PROCESSORS.values():
        processor = build()
        expected = run(processor)
        same = {"do_pad": False, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "device": "cpu"}
        same |= {"image_mean": list(MEANS), "rescale_factor": 1 / 255, "resample": 3, "data_format": "channels_first"}
        for keywords in (same, {"images_kwargs": {**same, "resample": PILImageResampling.BICUBIC}}):
            given = run(processor, **keywords)
            assert torch.equal(given["pixel_values"], expected["pixel_values"])
    run(qwen_processor(), patch_size=14, merge_size=2, do_center_crop=False)


@families
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: not possible for one call"),
        ({"image_mean": 0.5}, "image_mean: not possible for one call"),
        ({"images_kwargs": {"resample": 2}}, "resample: not possible for one call"),
        ({"do_convert_rgb": False}, "do_convert_rgb=False is not possible"),
        (
            {"input_data_format": "channels"},
            "input_data_format must be channels_first or channels_last, got 'channels'",
        ),
        ({"data_format": "channels_last"}, "data_format must be channels_first"),
        ({"device": "cuda"}, "device='cuda' is not possible: without torchvision.*inputs.to"),
        ({"do_resize": "no"}, "QZoomProcessor: Validation error for field 'do_resize'"),
        ({"images_kwargs": ["size"]}, r"images_kwargs must be a dict of keywords, got \['size'\]"),
    ],
)
def test_keywords_that_spoil_the_coarse_view(family, keywords, message):
    with pytest.raises(ValueError, match=message):
        run(PROCESSORS[family](), **keywords)


@qwens
@pytest.mark.parametrize("name", ["patch_size", "merge_size", "temporal_patch_size"])
def test_another_grid_than_the_models(build, name):
    with pytest.raises(ValueError, match=f"{name}=7 is not possible: the model's vision tower has {name} ="):
        run(build(), **{name: 7})


@families
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("do_rescale", False, "the model scales the 8-bit pixels of its crops"),
        ("do_normalize", False, "the model makes the crop itself"),
        ("do_normalize", None, "the model makes the crop itself"),
        ("rescale_factor", 1 / 127.5, "scales the 8-bit pixels of its crops by 1/255"),
        ("rescale_factor", 1, "scales the 8-bit pixels"),
        ("resample", PILImageResampling.BILINEAR, "bicubic"),
        ("resample", None, "bicubic"),
        ("do_pad", True, "do_pad"),
    ],
)
def test_settings_of_the_image_processor_that_spoil_the_coarse_view(family, name, value, message, tmp_path):
    processor = PROCESSORS[family]()
    setattr(processor.image_processor, name, value)
    with pytest.raises(ValueError, match=message):
        run(processor)
    processor(text="no image, no harm")
    if value is not None:
        with pytest.raises(ValueError, match=message):
            run(QZoomProcessor.from_backbone(processor.backbone_processor))


def test_images_as_they_are():
    processor = qwen_processor()
    inputs = run(processor, noise(56, 84), do_resize=False)
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert torch.equal(inputs["pixel_values"], run(processor, noise(56, 84))["pixel_values"])
    with pytest.raises(ValueError, match=r"^image 1 \(row 1, image 0\) has 57 × 84 pixels; .* multiples of 28"):
        run(processor, noise(56, 84), noise(57, 84), do_resize=False)
    for budget in ({"max_tokens": 9}, {"size": {"shortest_edge": 784, "longest_edge": 7840}}):
        with pytest.raises(ValueError, match="would have no effect without do_resize=True"):
            run(processor, noise(56, 84), do_resize=False, **budget)
    processor.image_processor.do_resize = False
    with pytest.raises(ValueError, match="multiples of 28"):
        run(processor, noise(56, 85))
    llava = llava_processor()
    assert run(llava, noise(112, 84), do_resize=False)["source_boxes"].tolist() == [[28, 14, 84, 70]]


def test_fixed_grids_refuse_images_that_no_memory_holds():
    padding = LlavaImageProcessor(do_pad=True, size={"shortest_edge": 56}, crop_size=56)
    for processor in (llava_processor(), llava_processor(padding)):
        with pytest.raises(ValueError, match=r"image 1 has 900000 × 1 pixels and would take .* too long. Cut it"):
            run(processor, noise(9, 9), np.zeros((1, 900_000, 3), np.uint8))


def with_saved_defaults(folder, **defaults) -> QZoomProcessor:
    llava_tokenizer().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **defaults)
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = QZoomProcessor(
        images, tokenizer, backbone_model_type="llava", backbone_processor_kwargs=LLAVA_ARGUMENTS
    )
    processor.save_pretrained(folder)
    return QZoomProcessor.from_pretrained(folder)


def test_saved_padding_holds_unless_the_call_says_more(tmp_path):
    processor = with_saved_defaults(tmp_path, padding="max_length", max_length=61)
    for inputs in (run(processor), process(processor, [chat(noise(56, 56), "hi")])):
        assert inputs["input_ids"].shape == (1, 61) and not inputs["attention_mask"][0, 0]
    assert run(processor, max_length=70)["input_ids"].shape == (1, 70)
    assert run(processor, padding=True)["input_ids"].shape == (1, 16)
    assert run(processor, text_kwargs={"padding": "longest"})["input_ids"].shape == (1, 16)


def test_saved_truncation_and_multiples_hold(tmp_path):
    processor = with_saved_defaults(tmp_path, truncation=True, max_length=8, pad_to_multiple_of=4)
    assert processor(text=["a long text", "ab"])["attention_mask"].sum(1).tolist() == [8, 2]
    assert processor(text="a long text", truncation=False)["input_ids"].shape == (1, 12)
    assert processor(text="ab")["input_ids"].shape == (1, 4)


def test_saved_kind_of_tensors_holds(tmp_path):
    processor = with_saved_defaults(tmp_path, return_tensors="np")
    for inputs in (run(processor), process(processor, [chat(noise(56, 56), "hi")])):
        assert isinstance(inputs["input_ids"], np.ndarray) and isinstance(inputs["pixel_values"], np.ndarray)
    assert torch.is_tensor(run(processor, return_tensors="pt")["input_ids"])


def test_image_settings_beside_the_tokenizer_do_not_come_back(tmp_path):
    """`from_pretrained` hands its keywords to every part."""
    qwen_processor().save_pretrained(tmp_path)
    processor = QZoomProcessor.from_pretrained(tmp_path, do_resize=False)
    processor.image_processor.do_resize = True
    assert run(processor, noise(57, 85))["image_grid_thw"].tolist() == [[1, 6, 4]]


GREETING = "{{ greeting }}{% if enable_thinking %}<think>{% endif %}{{ messages[0]['content'][0]['text'] }}"


@families
@pytest.mark.parametrize(
    "name", ["enable_thinking", "add_vision_id", "thinking_budget", "my_own", "role", "eos_token"]
)
def test_variables_of_other_templates(family, name):
    processor = PROCESSORS[family]()
    for tokenize in (False, True):
        options = {"tokenize": tokenize, "return_dict": tokenize}
        given = processor.apply_chat_template([chat("hi")], **options, **{name: False})
        expected = processor.apply_chat_template([chat("hi")], **options)
        assert (
            (given["input_ids"].tolist(), 0) == (expected["input_ids"].tolist(), 0) if tokenize else given == expected
        )


def test_variables_reach_the_template_that_reads_them():
    plain = {"greeting": "oh ", "enable_thinking": True}
    assert qwen_processor().apply_chat_template(chat("hi"), GREETING, **plain, other=3) == "oh <think>hi"
    named = qwen_processor(chat_template={"default": "{{ greeting }}", "long": GREETING})
    assert named.apply_chat_template(chat("hi"), **plain) == "oh "
    assert named.apply_chat_template(chat("hi"), "long", **plain) == "oh <think>hi"
    inputs = named.apply_chat_template(chat("hi"), "long", tokenize=True, max_tokens=9, **plain)
    assert named.decode(inputs[0]) == "oh <think>hi"


def test_names_that_a_template_shares_with_us():
    """A template's own variable wins over the processor's keyword, but over neither the budget nor `generate`."""
    processor = qwen_processor()
    assert processor.apply_chat_template(chat("hi"), "{{ padding }}hi", padding="oh ") == "oh hi"
    assert processor.apply_chat_template(chat("hi"), "{% if max_tokens %}oh {% endif %}hi", max_tokens=9) == "hi"
    with pytest.raises(ValueError, match="zoom: for `generate`, not for the processor"):
        processor.apply_chat_template(chat("hi"), "{{ zoom }}hi", zoom="never")


def test_safety_that_only_a_newer_transformers_gives_is_not_passed_over():
    with pytest.raises(ValueError, match="'sanitize_control_token'"):
        qwen_processor().apply_chat_template(chat("hi"), sanitize_control_token=True)


def test_variables_without_effect_are_told(caplog):
    transformers_logging.set_verbosity_warning()
    try:
        with caplog.at_level(logging.WARNING):
            qwen_processor().apply_chat_template(chat("hi"), a_rare_name=True)
    finally:
        transformers_logging.set_verbosity_error()
    assert "The chat template does not read a_rare_name" in caplog.text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_token", "max_tokens"),
        ("MIN_TOKENS", "min_tokens"),
        ("paddding", "padding"),
        ("truncations", "truncation"),
        ("gate_treshold", "gate_threshold"),
        ("max_new_token", "max_new_tokens"),
        ("image_kwargs", "images_kwargs"),
        ("max_pixel", "max_pixels"),
    ],
)
def test_misspelt_keywords_beside_a_chat(name, meant):
    for options in ({}, {"tokenize": True, "return_dict": True}):
        with pytest.raises(ValueError, match=rf"'{name}'|use min_tokens") as caught:
            qwen_processor().apply_chat_template(chat("hi"), **{name: 3}, **options)
        assert meant in str(caught.value) or meant == "max_pixels"


@families
def test_no_prompts(family):
    processor = PROCESSORS[family]()
    with pytest.raises(ValueError, match="text holds no prompts"):
        processor(text=[])
    with pytest.raises(ValueError, match="text holds no prompts"):
        processor(text=(), images=[noise(56, 56)])
    for options in ({}, {"tokenize": True, "return_dict": True}):
        with pytest.raises(ValueError, match="the chat holds no message"):
            processor.apply_chat_template([], **options)


@families
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_empty_prompts(family, tensors):
    processor = PROCESSORS[family]()
    options = {"return_tensors": tensors}
    for text, rows in (("", r"\[0\]"), (["a", "", "b", ""], r"\[1, 3\]")):
        with pytest.raises(ValueError, match=f"rows {rows}: the prompt is empty"):
            processor(text=text, **options)
        with pytest.raises(ValueError, match=f"rows {rows}: the prompt is empty"):
            processor(text=text, padding_side="right", **options)
    assert len(processor(text=[" ", "a"], **options)["input_ids"]) == 2


@qwens
def test_images_that_touch(build):
    processor = build()
    token, images = processor.image_token, [noise(56, 56), noise(84, 56)]
    with pytest.raises(
        ValueError, match=r"row 1 has two <\|image_pad\|> without anything between.*<\|vision_start\|>"
    ):
        processor(images=[images[0], *images], text=[token, f"x{token}{token}"])
    for between in ("<|vision_end|><|vision_start|>", " "):
        assert len(processor(images=images, text=f"{token}{between}{token}")["source_images"]) == 2


def test_images_of_families_without_markers_may_touch():
    processor = llava_processor()
    inputs = processor(images=[noise(56, 56), noise(84, 56)], text=processor.image_token * 2)
    model = tiny_model("llava")
    assert model.generate(**inputs, zoom="always", max_new_tokens=1).shape[0] == 1


def test_tokenizers_that_begin_every_text_have_no_empty_prompts():
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% endfor %}"
    processor = QZoomProcessor(qwen_processor().image_processor, tokenizer)
    with pytest.raises(ValueError, match="the prompt is empty"):
        processor.apply_chat_template(chat("hi"), tokenize=True, return_dict=True)
