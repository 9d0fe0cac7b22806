"""Inputs of `generate` and of training passes that do not fit: the cause is named before any layer runs."""

import pytest
import torch
from transformers import DynamicCache

from tests.generation_fixtures import always, no_zoom, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs


families = pytest.mark.parametrize("family", FAMILIES)
ROWS = [Row(["see ", None, " there"], [(2, 5)], 31), Row(["and ", None, " or ", None, "?"], [(3, 3), (4, 2)], 32)]


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch):
    """No vision tower and no decoder layer of the shared models."""
    for family in FAMILIES:
        model = shared_model(family)
        monkeypatch.setattr(model.vlm, "get_image_features", None)
        monkeypatch.setattr(model.vlm.get_decoder().layers[0], "forward", None)


def qwen(**changes):
    return {**make_inputs("qwen2_5_vl", ROWS), **changes}


def refuse(message: str, inputs: dict, family: str = "qwen2_5_vl", **options) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        shared_model(family).generate(**{**inputs, "max_new_tokens": 1, **options})


IDS = torch.tensor([[70, 71, 72], [73, 74, 75]])


@families
@pytest.mark.parametrize("zoom", ["auto", "always", "never"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[70, 71]], "input_ids must be a tensor of whole numbers .* got a list"),
        (IDS[0], r"got a torch.int64 tensor of shape \(3,\); a single prompt needs a first dimension of 1"),
        (IDS[None], r"of shape \(1, 2, 3\)"),
        (IDS.float(), "got a torch.float32 tensor"),
        (IDS > 71, "got a torch.bool tensor"),
        (IDS[:, :0], r"the prompt is empty: input_ids has the shape \(2, 0\)"),
        (IDS[:0], r"the prompt is empty: input_ids has the shape \(0, 3\)"),
        (IDS - 72, "input_ids holds -2, which is no token of this model .*0 to 319.*-100 kept for labels"),
        (IDS + 250, "input_ids holds 325, which is no token"),
    ],
)
def test_ids_that_no_model_takes(family, zoom, ids, message):
    refuse(message, {"input_ids": ids}, family, zoom=zoom)
    with pytest.raises(ValueError, match=message):
        shared_model(family).generate(ids, zoom=zoom)
    with pytest.raises(ValueError, match=message):
        shared_model(family)(ids, gate_targets=torch.ones(2))


@families
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask[:, 1:], "attention_mask must be a tensor .* like input_ids"),
        (lambda mask: mask[:1], "attention_mask must be a tensor"),
        (lambda mask: mask[:, None, None], r"got a torch.int64 tensor of shape \(2, 1, 1, "),
        (lambda mask: mask.tolist(), "got a list"),
        (lambda mask: mask * 2, "attention_mask must hold ones and zeros"),
        (lambda mask: torch.where(mask > 0, 0.0, float("-inf")), "attention_mask must hold ones and zeros"),
        (lambda mask: mask * torch.tensor([[1], [0]]), r"rows \[1\] are empty: attention_mask hides every token"),
    ],
)
def test_masks_that_do_not_fit(family, images, change, message):
    inputs = make_inputs(family, ROWS if images else [Row(["one"]), Row(["another"])])
    refuse(message, {**inputs, "attention_mask": change(inputs["attention_mask"])}, family)


GRIDS = make_inputs("qwen2_5_vl", ROWS)["image_grid_thw"]
PIXELS = make_inputs("qwen2_5_vl", ROWS)["pixel_values"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_thw": GRIDS * torch.tensor([1, 1, 0])}, r"grid 0 is \(1, 4, 0\) in patches; h and w must be"),
        ({"image_grid_thw": GRIDS - torch.tensor([0, 1, 0])}, "positive multiples of 2"),
        ({"image_grid_thw": -GRIDS}, "positive multiples of 2"),
        ({"image_grid_thw": GRIDS * torch.tensor([[1], [1], [2]])}, "t = 1. Pass videos as pixel_values_videos"),
        ({"image_grid_thw": GRIDS.tolist()}, "image_grid_thw must be a tensor of whole numbers .* got a list"),
        ({"image_grid_thw": GRIDS.float()}, "got a torch.float32 tensor"),
        ({"image_grid_thw": GRIDS[:, 1:]}, r"of shape \(3, 2\)"),
        ({"image_grid_thw": GRIDS[:2]}, "prompt has image tokens left but only 2 images"),
        ({"image_grid_thw": GRIDS[[1, 0, 2]]}, "row 0, image 1: an image of 2 × 5 tokens needs 10"),
        ({"image_grid_thw": GRIDS[:, [0, 2, 1]]}, "image 0 .* is 121 × 275 pixels .* its token grid is 5 × 2"),
        ({"pixel_values": PIXELS[:-4]}, r"pixel_values must be a tensor \(108, 1176\), a row for every patch"),
        ({"pixel_values": PIXELS[:, 1:]}, r"got a torch.float32 tensor of shape \(108, 1175\)"),
        ({"pixel_values": PIXELS[None]}, r"of shape \(1, 108, 1176\)"),
        ({"pixel_values": PIXELS.tolist()}, "got a list"),
        (
            {"pixel_values": PIXELS.index_fill(0, torch.tensor([99]), float("nan"))},
            "pixel_values holds NaN or infinite",
        ),
        ({"pixel_values": PIXELS / 0}, "pixel_values holds NaN or infinite"),
        ({"mm_token_type_ids": torch.zeros_like(qwen()["input_ids"])}, "mm_token_type_ids must be 1 exactly where"),
        ({"mm_token_type_ids": qwen()["mm_token_type_ids"][:, 1:]}, "mm_token_type_ids must be 1 exactly where"),
        ({"mm_encoder_outputs": {"image": PIXELS}}, "mm_encoder_outputs must be a dict with what get_image_features"),
        ({"pixel_values_videos": PIXELS}, "pixel_values_videos was given without video_grid_thw"),
        (
            {"pixel_values_videos": PIXELS, "video_grid_thw": GRIDS},
            "the prompts hold 0 video tokens, the given videos make 27",
        ),
    ],
)
def test_pixels_and_grids_that_do_not_fit(changes, message):
    refuse(message, qwen(**changes), **always())
    if "275" not in message:  # targets need no sources
        with pytest.raises(ValueError, match=f"(?s){message}"):
            shared_model("qwen2_5_vl")(**plain_inputs(qwen(**changes)), gate_targets=torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pixels: pixels[:2], r"pixel_values must be a tensor \(3, 3, 56, 56\), an image for every 16"),
        (lambda pixels: pixels[:, :1], r"of shape \(3, 1, 56, 56\)"),
        (lambda pixels: pixels[..., :42], r"of shape \(3, 3, 56, 42\)"),
        (lambda pixels: pixels * float("nan"), "pixel_values holds NaN"),
        (lambda pixels: None, "pixel_values is missing"),
    ],
)
def test_pixels_of_one_size(change, message):
    inputs = make_inputs("llava", ROWS)
    refuse(message, {**inputs, "pixel_values": change(inputs["pixel_values"])}, "llava")
    refuse("image_grid_thw does not apply", {**inputs, "image_grid_thw": GRIDS}, "llava")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_without_anything_between_look_like_one(family):
    inputs = make_inputs(family, ROWS[:1])
    ids = inputs["input_ids"]
    image = ids[:, (ids[0] == shared_model(family).config.image_token_id).nonzero()[:, 0]]
    joined = torch.cat([ids[:, :2], image, image, ids[:, :3]], dim=1)
    doubled = {name: torch.cat([inputs[name]] * 2) for name in ("pixel_values", "image_grid_thw")}
    refuse("no visible token stands between images 0 and 1", {"input_ids": joined, **doubled}, family, **always())


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ("0 0 9 9", "source_boxes must hold finite numbers .*, it holds '0 0 9 9'"),
        ([["0", "0", "9", "9"]], "it holds '0'"),
        ([[0, 0, float("inf"), 9]], "it holds 'inf'"),
        (torch.tensor([[0, 0, float("nan"), 9]]), "it holds 'nan'"),
        ([[0, 0, True, 9]], "it holds 'True'"),
        ({"x0": 1}, "must hold finite numbers"),
        ([[0, 0, 9]], "source_boxes holds 3 numbers"),
        ([[9, 0, 3, 4]], "has no area"),
    ],
)
def test_source_boxes_that_are_none(boxes, message):
    refuse(message, make_inputs("llava", ROWS[:1]), "llava", **always(), source_boxes=boxes)


@families
@pytest.mark.parametrize("options", [{"zoom": "auto"}, {"zoom": "always"}, no_zoom()])
@pytest.mark.parametrize("form", ["mask", "pad tokens", "cache"])
def test_right_padded_text_is_refused_whatever_tells_it(family, options, form):
    model = shared_model(family)
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[70, 71, 72, pad], [73, 74, 75, 76]])
    given = {} if form == "pad tokens" else {"attention_mask": (ids != pad).long()}
    if form == "cache":
        given["past_key_values"] = DynamicCache()
    refuse(r"rows \[0\] are padded on the right", {"input_ids": ids, **given}, family, **options)
