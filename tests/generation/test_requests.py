"""Source images and rectangles as users and pipelines hand them over."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_qzoom.backbones_qzoom import token_grid_of
from modeling_qzoom.prompt_qzoom import ImageSpan
from modeling_qzoom.zoom_request_qzoom import collect_grid_boxes, collect_sources
from tests.generation_fixtures import always, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, random_source


families = pytest.mark.parametrize("family", FAMILIES)


def spans(*counts: int) -> list[list[ImageSpan]]:
    return [[ImageSpan(0, 1, (1, 1), 0)] * count for count in counts]


def sources(count: int, height: int = 40, width: int = 50) -> list[torch.Tensor]:
    return [random_source(height, width, seed) for seed in range(count)]


def as_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def equal(given, wanted) -> bool:
    return len(given) == len(wanted) and all(one.equal(two) for one, two in zip(given, wanted))


@pytest.mark.parametrize("kind", ["flat", "tuple", "nested", "nested tuples", "None rows", "PIL", "stack", "mixed"])
def test_accepted_forms(kind):
    images = sources(3)
    forms = {
        "flat": images,
        "tuple": tuple(images),
        "nested": [images[:2], [], images[2:]],
        "nested tuples": (tuple(images[:2]), (), (images[2],)),
        "None rows": [images[:2], None, images[2:]],
        "PIL": [as_pil(image) for image in images],
        "stack": torch.stack(images),
        "mixed": [[images[0], as_pil(images[1])], None, [images[2]]],
    }
    assert equal(collect_sources(forms[kind], spans(2, 0, 1)), images)


@pytest.mark.parametrize("convert", [lambda image: image, as_pil, lambda image: [image], lambda image: [[image]]])
def test_a_single_image(convert):
    (image,) = sources(1)
    assert equal(collect_sources(convert(image), spans(1)), [image])


def test_pil_images_are_turned_upright_as_the_processor_does():
    """Orientation 6: stored on its side, to be shown rotated by a quarter."""
    upright = random_source(40, 60, 0)
    stored = as_pil(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6
    stored.info["exif"] = exif.tobytes()
    assert equal(collect_sources([stored], spans(1)), [upright])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pil_images_of_other_modes(mode):
    (source,) = collect_sources([as_pil(random_source(40, 60, 0)).convert(mode)], spans(1))
    assert source.shape == (3, 40, 60) and source.dtype == torch.uint8 and source.float().std() > 10


def test_missing_sources_name_processor_and_way_out():
    with pytest.raises(
        ValueError, match="row 1 holds image tokens but source_images is missing.*QZoomProcessor.*never"
    ):
        collect_sources(None, spans(0, 2))


@pytest.mark.parametrize(
    ("images", "counts", "message"),
    [
        (sources(2), (1, 2), "has 2 images, the prompts have 3; the first one missing is row 1, image 1"),
        (sources(1), (1, 0, 1), "has 1 images, the prompts have 2; the first one missing is row 2, image 0"),
        (sources(3), (1, 1), "has 3 images, the prompts have only 2; image 2 has no place in row 1"),
        ([], (1,), "has 0 images, the prompts have 1; the first one missing is row 0, image 0"),
        ([sources(1), sources(1)], (1, 0), "row 1 has 1 images, its prompt has 0"),
        ([sources(2), sources(1)], (1, 2), "row 0 has 2 images, its prompt has 1"),
        ([None, sources(1)], (1, 1), "row 0 has 0 images, its prompt has 1"),
        ([sources(1)], (1, 1), "source_images has 1 rows, the batch 2"),
    ],
)
def test_wrong_counts_name_row_and_image(images, counts, message):
    with pytest.raises(ValueError, match=message):
        collect_sources(images, spans(*counts))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 40, 50), r"image 1 \(row 1, image 0\) is a torch.float32 tensor of shape \(3, 40, 50\)"),
        (torch.zeros(40, 50, 3, dtype=torch.uint8), r"image 1 .* of shape \(40, 50, 3\); expected uint8 \(3, H, W\)"),
        (torch.zeros(1, 40, 50, dtype=torch.uint8), r"of shape \(1, 40, 50\)"),
        (torch.zeros(3, 0, 50, dtype=torch.uint8), r"of shape \(3, 0, 50\)"),
        (torch.zeros(40, 50, dtype=torch.uint8), r"of shape \(40, 50\)"),
        (np.zeros((40, 50, 3), dtype=np.uint8), "is a ndarray; expected a PIL image or a uint8 tensor"),
        ("page.png", "is a str; expected a PIL image"),
        (None, r"image 1 \(row 1, image 0\) is a NoneType"),
    ],
)
def test_wrong_kinds_name_their_place(image, message):
    with pytest.raises(ValueError, match=f"source_images: .*{message}"):
        collect_sources([*sources(1), image], spans(1, 1))


BOXES = [(0.0, -10.0, 50.0, 40.0), (5.0, 0.0, 45.0, 40.0)]


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(BOXES).long(),
        torch.tensor(BOXES),
        BOXES,
        [list(box) for box in BOXES],
        [torch.tensor(box) for box in BOXES],
        [[BOXES[0]], [BOXES[1]]],
        [[BOXES[0]], None, [], [BOXES[1]]],
        [torch.tensor([BOXES[0]]), torch.zeros(0, 4), torch.tensor([BOXES[1]])],
        torch.tensor(BOXES)[:, None],
    ],
)
def test_source_boxes_flat_or_by_row(given):
    """As tensors, as lists, and as a pipeline collates a batch."""
    assert collect_grid_boxes(given, 2) == BOXES
    assert all(type(value) is float for box in collect_grid_boxes(given, 2) for value in box)


def test_without_source_boxes_grids_cover_whole_images():
    assert collect_grid_boxes(None, 3) == [None] * 3


@pytest.mark.parametrize("given", [BOXES[:1], BOXES + BOXES, [BOXES[0], BOXES[1][:3]], []])
def test_source_boxes_of_the_wrong_number(given):
    with pytest.raises(ValueError, match="expected 4 .* for each of the prompts' 2 images"):
        collect_grid_boxes(given, 2)


def test_source_boxes_without_area():
    with pytest.raises(ValueError, match="rectangle 1, .* has no area"):
        collect_grid_boxes([BOXES[0], (5, 0, 5, 40)], 2)


@families
def test_generate_takes_every_form(family):
    rows = [Row(["a", None, "b"], [(3, 4)], 1), Row(["words"], [], 3), Row([None, " c ", None], [(2, 2), (3, 3)], 2)]
    inputs, model = make_inputs(family, rows), shared_model(family)
    images = inputs.pop("source_images")
    forms = [
        images,
        [images[:1], None, images[1:]],
        [images[:1], [], images[1:]],
        [as_pil(image) for image in images],
    ]
    outputs = [
        model.generate(**inputs, source_images=form, **always(), max_new_tokens=4, return_zoom_reports=True)
        for form in forms
    ]
    for output in outputs:
        assert output.sequences.equal(outputs[0].sequences)
        assert [report.box for report in output.zoom_reports] == [report.box for report in outputs[0].zoom_reports]
    assert [report.zoomed for report in outputs[0].zoom_reports] == [True, False, True]


@families
@pytest.mark.parametrize("zoom", ["auto", "always"])
def test_generate_without_sources(family, zoom):
    inputs = make_inputs(family, [Row(["words"], [], 3), Row(["a", None, "b"], [(3, 4)], 1)])
    del inputs["source_images"]
    with pytest.raises(ValueError, match="row 1 .*QZoomProcessor.*zoom='never'"):
        shared_model(family).generate(**inputs, zoom=zoom, max_new_tokens=1)
    assert len(shared_model(family).generate(**inputs, zoom="never", max_new_tokens=1)) == 2


def test_forward_without_sources():
    inputs = make_inputs("qwen2_5_vl", [Row(["a", None, "b"], [(3, 4)], 1)])
    del inputs["source_images"]
    with pytest.raises(ValueError, match="row 0 .*QZoomProcessor.*no zoom_boxes in `forward`"):
        shared_model("qwen2_5_vl")(**inputs, labels=inputs["input_ids"], zoom_boxes=[(0, 0, 20, 20)])
    plain = shared_model("qwen2_5_vl")(**inputs, labels=inputs["input_ids"])  # the way out
    assert plain.loss.isfinite()


@families
def test_sources_of_another_size_than_the_coarse_view(family):
    """Only their content and proportions matter; a source may even be smaller than the view."""
    inputs = make_inputs(family, [Row(["a", None, "b"], [(3, 4)], 1)])
    for size in ((9, 12), (1500, 2000)):
        inputs["source_images"] = [random_source(*size, 0)]
        report = (
            shared_model(family)
            .generate(**inputs, **always(), max_new_tokens=1, return_zoom_reports=True)
            .zoom_reports[0]
        )
        assert report.zoomed and report.box[2] <= size[1] and report.box[3] <= size[0]


@families
def test_sources_that_no_prompt_mentions(family):
    """The placeholder was forgotten; empty lists, as for text-only rows, are fine."""
    text, model = make_inputs(family, [Row(["words"], [], 0), Row(["more"], [], 0)]), shared_model(family)
    with pytest.raises(ValueError, match="has 1 images, the prompts have only 0"):
        model.generate(**text, source_images=sources(1), max_new_tokens=1)
    expected = model.generate(**text, max_new_tokens=1)
    for nothing in ([], [[], []], [None, None]):
        assert model.generate(**text, source_images=nothing, max_new_tokens=1).equal(expected)
    assert model.generate(**text, source_images=sources(1), zoom="never", max_new_tokens=1).equal(expected)


@families
def test_image_tokens_without_pixels(family):
    inputs = make_inputs(family, [Row(["a", None, "b"], [(3, 4)], 1)])
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="holds image tokens but pixel_values is missing"):
        shared_model(family).generate(**inputs, **always(), max_new_tokens=1)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_image_tokens_that_do_not_fit_the_grid(family):
    inputs = make_inputs(family, [Row(["a", None, "b"], [(3, 4)], 1)])
    model = shared_model(family)
    wrong = {**inputs, "image_grid_thw": torch.tensor([[1, 8, 8]])}
    with pytest.raises(ValueError, match="row 0, image 0: an image of 4 × 4 tokens needs 16 image tokens .* has 12"):
        model.generate(**wrong, **always(), max_new_tokens=1)
    del wrong["image_grid_thw"]
    with pytest.raises(ValueError, match="image_grid_thw is missing; pass what the processor returned"):
        model.generate(**wrong, **always(), max_new_tokens=1)


def test_llava_image_tokens_come_in_whole_images():
    config = shared_model("llava").config.vlm_config
    with pytest.raises(ValueError, match="15 image tokens are not a multiple of the 16"):
        token_grid_of(config).token_grids(15, None)


@pytest.mark.parametrize("nested", [False, True])
def test_source_boxes_reach_the_region(nested):
    """The middle square of a wide image: boxes lie in it, and the report says what the map covers."""
    rows = [Row(["a", None, "b"], [], 1), Row(["words"], [], 2), Row([None, "c"], [], 3)]
    inputs = make_inputs("llava", rows)
    inputs["source_images"] = [random_source(100, 300, 0), random_source(300, 100, 1)]
    boxes = [(100, 0, 200, 100), (0, 100, 100, 200)]
    inputs["source_boxes"] = [[boxes[0]], [], [boxes[1]]] if nested else torch.tensor(boxes)
    everywhere = always(region_threshold=0.0)
    reports = (
        shared_model("llava").generate(**inputs, **everywhere, max_new_tokens=1, return_zoom_reports=True).zoom_reports
    )
    assert [report.grid_box for report in reports] == [boxes[0], None, boxes[1]]
    assert [report.box for report in reports] == [boxes[0], None, boxes[1]]


@pytest.mark.parametrize("size", [(1, 4), (4, 1), (2, 3), (5, 6)])
@pytest.mark.parametrize("offset", [-9, 0, 9])
def test_sources_may_differ_from_their_grid_as_rounding_lets_them(size, offset):
    model = shared_model("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", [Row([None, "?"], [size], 1)])
    height, width = 28 * size[0] + offset, 28 * size[1] - offset
    model.generate(**{**inputs, "source_images": [random_source(height, width, 0)]}, **always(), max_new_tokens=1)


@families
def test_arrays_do_as_source_boxes(family):
    inputs = make_inputs(family, [Row(["see ", None, " there"], [(2, 5)], 31)])
    boxes = torch.tensor([[0.0, 0.0, 100.0, 100.0]])
    outputs = [
        shared_model(family).generate(**inputs, **always(), source_boxes=form, max_new_tokens=1)
        for form in (boxes, boxes.numpy(), list(boxes.numpy()))
    ]
    assert outputs[0].equal(outputs[1]) and outputs[0].equal(outputs[2])
