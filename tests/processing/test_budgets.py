"""The budget of the coarse view: of everything that sets it the last one wins, and none is beyond reason."""

import copy
import json
import pickle

import pytest
import torch
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor
from transformers.image_utils import SizeDict

from modeling_qzoom import QZoomProcessor
from tests.processing_fixtures import chat, llava_processor, noise, process, qwen3_processor, qwen_processor
from tests.tiny import qwen_tokenizer


AREA = 28 * 28
LARGE, SMALL = noise(700, 700), noise(28, 28)


def areas(low: int, high: int, area: int = AREA) -> dict[str, int]:
    return {"shortest_edge": low * area, "longest_edge": high * area}


def bounds(processor, **kwargs) -> tuple[int, int]:
    """Tokens of a small and of a large image."""
    text = [processor.image_token] * 2
    grids = processor(images=[SMALL, LARGE], text=text, **kwargs)["image_grid_thw"]
    return tuple((grids.prod(1) // 4).tolist())


@pytest.fixture
def folder(tmp_path):
    qwen_processor(min_tokens=16, max_tokens=100).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (16, 100)),
        ({"size": areas(4, 9)}, (4, 9)),
        ({"size": areas(121, 225)}, (121, 225)),
        ({"min_tokens": 4}, (4, 100)),
        ({"max_tokens": 64}, (16, 64)),
        ({"max_tokens": 9}, (9, 9)),
        ({"min_tokens": 144}, (144, 144)),
        ({"min_tokens": 144, "max_tokens": 225}, (144, 225)),
        ({"max_pixels": 64 * AREA}, (16, 64)),
        ({"max_pixels": 9 * AREA}, (9, 9)),
        ({"min_pixels": 144 * AREA}, (144, 144)),
        ({"min_pixels": 4 * AREA, "max_pixels": 9 * AREA}, (4, 9)),
        ({"max_tokens": None}, (16, 625)),
    ],
)
def test_what_is_given_at_loading_wins(folder, given, expected, tmp_path):
    processor = QZoomProcessor.from_pretrained(folder, **given)
    assert bounds(processor) == expected
    # the call has the last word
    assert bounds(processor, min_tokens=25, max_tokens=49) == (25, 49)
    assert bounds(processor, size=areas(25, 49)) == (25, 49)
    assert bounds(processor) == expected
    assert processor._get_num_multimodal_tokens([(28, 28), (700, 700)])["num_image_tokens"] == list(expected)
    processor.save_pretrained(tmp_path / "again")
    assert bounds(QZoomProcessor.from_pretrained(tmp_path / "again")) == expected
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert bounds(twin) == expected


@pytest.mark.parametrize("area", [{"size": areas(4, 9)}, {"max_pixels": 9 * AREA}])
def test_two_ways_at_once_are_refused(folder, area):
    (name,) = area
    with pytest.raises(
        ValueError, match=f"{name}, max_tokens all set the budget of the coarse view: give it in one way"
    ):
        QZoomProcessor.from_pretrained(folder, max_tokens=9, **area)
    with pytest.raises(ValueError, match="give it in one way"):
        QZoomProcessor.from_backbone(folder, max_tokens=9, **area)


@pytest.mark.parametrize("name", ["max_token", "min_tokns", "Max_Tokens", "max_source_pixel"])
def test_misspelt_settings_at_loading(folder, name):
    with pytest.raises(ValueError, match=f"does not know '{name}'; did you mean m"):
        QZoomProcessor.from_pretrained(folder, **{name: 9})
    with pytest.raises(ValueError, match=f"does not know '{name}'; did you mean m"):
        QZoomProcessor.from_backbone(str(folder), **{name: 9})


def test_a_size_set_later_wins():
    for size in (areas(4, 9), SizeDict(**areas(4, 9))):
        processor = qwen_processor(min_tokens=16, max_tokens=100)
        processor.image_processor.size = size
        assert bounds(processor) == (4, 9) and processor.min_tokens is processor.max_tokens is None
        assert json.loads(processor.to_json_string())["max_tokens"] is None
        assert bounds(processor, max_tokens=25) == (4, 25)
        processor.max_tokens = 36
        assert bounds(processor) == (4, 36) and processor.max_tokens == 36


def test_pixels_set_later_win_without_a_warning():
    processor = qwen_processor(min_tokens=16, max_tokens=100)
    processor.image_processor.max_pixels = 49 * AREA
    assert bounds(processor) == (4, 49)
    assert bounds(processor, min_tokens=64, max_tokens=81) == (64, 81)
    assert bounds(processor, size=areas(64, 81)) == (64, 81)
    assert processor.image_processor.max_pixels == 49 * AREA


def test_bounds_set_later_push_the_other_one():
    processor = qwen_processor(min_tokens=16, max_tokens=100)
    processor.max_tokens = 9
    assert bounds(processor) == (9, 9) and processor.min_tokens == 9
    processor.min_tokens = 64
    assert bounds(processor) == (64, 64) and processor.max_tokens == 64
    processor.max_tokens = 81
    assert bounds(processor) == (64, 81)
    processor.min_tokens = None
    assert bounds(processor) == (4, 81)
    for value in (0, -3, 2.5, True, "9"):
        with pytest.raises(ValueError, match="max_tokens must be a positive number"):
            processor.max_tokens = value
    assert processor.max_tokens == 81
    with pytest.raises(ValueError, match="one fixed token grid"):
        llava_processor().max_tokens = 9


def test_a_shared_image_processor_follows_whoever_spoke_last():
    images = Qwen2VLImageProcessor(size=areas(4, 49))
    first, second = (QZoomProcessor(images, qwen_tokenizer(), max_tokens=most) for most in (9, 25))
    assert bounds(first) == (4, 9) and bounds(second) == (4, 25)
    images.size = areas(4, 64)
    assert bounds(first) == bounds(second) == (4, 64)


MOST = 2**18


@pytest.mark.parametrize("build", [qwen_processor, qwen3_processor])
@pytest.mark.parametrize("budget", [{"min_tokens": MOST + 1}, {"max_tokens": 10**7}, {"min_tokens": 10**400}])
def test_budgets_that_no_context_holds(build, budget):
    (name,) = budget
    for attempt in (
        lambda: build(**budget),
        lambda: build()(text="hi", **budget),
        lambda: process(build(), [chat(SMALL)], **budget),
        lambda: setattr(build(), name, budget[name]),
    ):
        with pytest.raises(ValueError, match=f"{name} = .* is more than 262144 tokens, the longest context"):
            attempt()
    assert build(max_tokens=MOST).max_tokens == MOST


def test_sizes_that_no_context_holds():
    processor = qwen_processor()
    huge = areas(MOST + 1, 2 * MOST)
    image = {"images": [SMALL], "text": processor.image_token}
    for inputs in ({"text": "hi"}, image):  # text first: without the check an image would be resized for minutes
        with pytest.raises(ValueError, match="^size asks for at least .* more than 262144 tokens"):
            processor(**inputs, size=huge)
    processor.image_processor.size = huge
    for inputs in ({"text": "hi"}, image):
        with pytest.raises(ValueError, match="^image_processor.size asks for at least"):
            processor(**inputs)
    with pytest.raises(ValueError, match=r"^crop_size must be a side .* from 1 to 7168"):
        llava = llava_processor()
        llava(images=[SMALL], text=llava.image_token, crop_size=10**6)


@pytest.mark.parametrize(
    "size",
    [
        "large",
        28,
        [28, 28],
        {"height": 28, "width": 28},
        {"longest_edge": 9 * AREA},
        {**areas(4, 9), "height": 3},
        areas(4, 9) | {"shortest_edge": "x"},
        areas(4, 9) | {"shortest_edge": 0},
        areas(4, 9) | {"longest_edge": 1e6},
    ],
)
def test_sizes_that_are_no_areas(size):
    processor = qwen_processor()
    for given in ({"size": size}, {"images_kwargs": {"size": size}}):
        with pytest.raises(ValueError, match="^size must be {'shortest_edge': ..., 'longest_edge': ...}.*min_tokens"):
            processor(images=[SMALL], text=processor.image_token, **given)
    processor.image_processor.size = size
    with pytest.raises(ValueError, match="^image_processor.size must be {'shortest_edge'"):
        processor(images=[SMALL], text=processor.image_token)


def test_a_size_whose_edges_cross():
    processor = qwen_processor()
    with pytest.raises(ValueError, match="shortest_edge is larger than longest_edge"):
        processor(images=[SMALL], text=processor.image_token, size=areas(9, 4))


@pytest.mark.parametrize("size", ["large", 0, -3, 2.5, {"height": 56}, {"height": "a", "width": 3}, True])
def test_sizes_of_fixed_grids_that_are_none(size):
    processor = llava_processor()
    with pytest.raises(ValueError, match="^size must be a side in pixels or"):
        processor(images=[SMALL], text=processor.image_token, size=size)
    with pytest.raises(ValueError, match="^crop_size must be a side in pixels or"):
        processor(images=[SMALL], text=processor.image_token, crop_size=size)


def test_sizes_of_fixed_grids_in_every_form():
    images, token = [noise(112, 84)], "<image>"
    boxes = {}
    for name, size in (("side", 84), ("edge", {"shortest_edge": 84}), ("sides", {"height": 84, "width": 84})):
        inputs = llava_processor()(images=images, text=token, size=size)
        boxes[name] = inputs["source_boxes"].tolist()
        assert inputs["pixel_values"].shape[2:] == (56, 56)
    assert boxes["side"] == boxes["edge"] == [[28, 14, 84, 70]] != boxes["sides"]
    # a side means a square where the image processor says so
    square = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56)
    square.default_to_square = True
    inputs = llava_processor(square)(images=images, text=token, size=84)
    assert inputs["source_boxes"].tolist() == boxes["sides"]
    assert torch.is_tensor(inputs["pixel_values"])
