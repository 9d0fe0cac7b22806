"""Source images that a data set stored and gave back as other integers, arrays or lists."""

import numpy as np
import pytest
import torch

from modeling_qzoom.prompt_qzoom import ImageSpan
from modeling_qzoom.zoom_request_qzoom import collect_sources
from tests.families import FAMILY
from tests.processing_fixtures import PROCESSORS, noise
from tests.tiny import random_source, tiny_model


SOURCES = [random_source(40, 52, 1), random_source(40, 52, 2), random_source(64, 36, 3)]


def spans(*counts: int) -> list[list[ImageSpan]]:
    return [[ImageSpan(1, 5, (2, 2), 0)] * count for count in counts]


def collect(images, *counts: int) -> list[torch.Tensor]:
    return collect_sources(images, spans(*counts))


def assert_equal(given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(source.dtype == torch.uint8 for source in given)
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32])
def test_tensors_of_other_integers(dtype):
    sources = [source // 2 for source in SOURCES]  # int8 ends at 127
    assert_equal(collect([source.to(dtype) for source in sources], 1, 2), sources)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">u2", "uint32", "int64", "uint64"])
def test_arrays(dtype):
    assert_equal(collect([source.numpy().astype(dtype) for source in SOURCES], 3), SOURCES)
    assert_equal(collect([np.asfortranarray(SOURCES[0].numpy().astype(dtype))], 1), SOURCES[:1])
    mirrored = SOURCES[0].numpy().astype(dtype)[:, :, ::-1]  # a view, read backwards
    assert_equal(collect([mirrored], 1), [SOURCES[0].flip(2)])


def test_nested_lists():
    lists = [source.tolist() for source in SOURCES]
    assert_equal(collect(lists, 2, 1), SOURCES)
    assert_equal(collect([lists[:2], [], lists[2:]], 2, 0, 1), SOURCES)
    assert_equal(collect([None, lists[:1]], 0, 1), SOURCES[:1])
    assert_equal(collect(lists[0], 1), SOURCES[:1])
    assert_equal(collect(tuple(lists), 3), SOURCES)
    assert_equal(collect([lists[0], SOURCES[1], SOURCES[2].numpy()], 3), SOURCES)


def test_stacks():
    pair = torch.stack(SOURCES[:2]).long()
    for stack in (pair, pair.numpy(), pair.tolist()):
        assert_equal(collect(stack, 2), SOURCES[:2])
        assert_equal(collect([stack, [SOURCES[2]]], 2, 1), SOURCES)
    rows = pair[:, None]  # one image a row
    for stack in (rows, rows.numpy(), rows.tolist()):
        assert_equal(collect(stack, 1, 1), SOURCES[:2])


def test_arrays_of_objects():
    ragged = np.empty(3, dtype=object)
    ragged[:] = [source.numpy().astype(np.int64) for source in SOURCES]
    assert_equal(collect(ragged, 3), SOURCES)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (SOURCES[0].long() + 200, "torch.int64 tensor of shape .*0..255"),
        (SOURCES[0].int() - 300, "torch.int32 tensor"),
        (SOURCES[0].float(), "torch.float32 tensor"),
        (SOURCES[0] > 9, "torch.bool tensor"),
        (SOURCES[0].numpy().astype(np.int32) * 9, r"is a ndarray; .* shape is \(3, 40, 52\), its type int32"),
        (SOURCES[0].numpy() / 255, r"is a ndarray; .* its type float64"),
        (SOURCES[0].permute(1, 2, 0).tolist(), r"is a ndarray; .*shape is \(40, 52, 3\)"),
        ([[[1, 2], [3]], [[4, 5], [6, 7]], [[8, 9], [1, 2]]], "is a list"),
        ([[[1.5, 2.0]], [[4, 5]], [[8, 9]]], "is a ndarray"),
    ],
)
def test_other_numbers_are_refused_with_their_place(image, message):
    with pytest.raises(ValueError, match=rf"source_images: image 1 \(row 0, image 1\) .*{message}"):
        collect([[SOURCES[0], image]] if isinstance(image, list) else [SOURCES[0], image], 2)


def test_the_callers_arrays_are_not_changed():
    array = SOURCES[0].numpy().copy()
    (source,) = collect([array], 1)
    assert np.array_equal(array, SOURCES[0].numpy()) and source.dtype == torch.uint8


@pytest.mark.parametrize("family", list(PROCESSORS))
def test_a_stored_row_is_answered_like_a_fresh_one(family):
    budget = FAMILY[family].budget(4, 24)
    processor, model = PROCESSORS[family](**budget), tiny_model(family)
    inputs = processor(images=[noise(90, 60, 5)], text=[f"{processor.image_token}how many?"])
    expected = model.generate(**inputs, zoom="always", max_new_tokens=3)
    stored = {**inputs, "source_images": torch.stack(inputs["source_images"]).long()}
    assert torch.equal(model.generate(**stored, zoom="always", max_new_tokens=3), expected)
