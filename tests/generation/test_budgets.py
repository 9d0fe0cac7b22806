"""Crop budgets by need: the rule of Vision-RL² to the pixel, and bounds that hold for every region."""

import functools
import math
import random

import pytest
from transformers import GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from modeling_qzoom import QZoomConfig
from modeling_qzoom.errors_qzoom import CropError, InputError, UnsupportedError
from modeling_qzoom.zoom_crops_qzoom import CropRecipe, crop_recipe, cut_crop
from modeling_qzoom.zoom_options_qzoom import ZoomOptions
from tests.families import FAMILY
from tests.generation_fixtures import always, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, random_source, tiny_model, vlm_config
from tests.visionrl2 import CASES, load_case


NATIVE = [family for family in FAMILIES if FAMILY[family].has_budget]


@functools.cache
def config(family: str, max_tokens: int | None) -> QZoomConfig:
    return QZoomConfig(vlm_config(family), branch_layer=3, branch_depth=2, max_tokens=max_tokens)


def recipe(family: str = "qwen2_5_vl", max_tokens: int | None = 576, **options) -> CropRecipe:
    return crop_recipe(config(family, max_tokens), ZoomOptions(**{"crop_budget": "need", **options}))


def published(height: int, width: int, side: int, target: int, source_tokens: int) -> int:
    """Pixels of a crop by the rule of Vision-RL², written out."""
    native, cell = height * width, side**2
    enlarged = min(target * cell, native * 9)
    kept = max(enlarged, native)
    most = min(3 * target * cell, source_tokens * cell // 2)
    return max(min(kept, most), 64 * cell)


@pytest.mark.parametrize("name", CASES)
def test_budgets_of_visionrl2(name):
    """Bound by the target, by the region's own size, and by half of the source."""
    case = load_case(name)
    family = {28: "qwen2_5_vl", 32: "qwen3_vl"}[case.token_side]
    target = case.settings["crop_target_tokens"]
    ours = recipe(family, case.source_tokens, crop_budget="visionrl2", crop_target_tokens=target)
    x0, y0, x1, y1 = case.values("crop_box_pixels")
    assert ours.need.area(y1 - y0, x1 - x0) == case.values("crop_min_pixels")[0] == case.values("crop_max_pixels")[0]
    _, rows, columns = case.values("crop_grid")
    assert ours.tokens(y1 - y0, x1 - x0) == (rows // 2, columns // 2)


@pytest.mark.parametrize(
    ("source_tokens", "target", "cap"),
    [
        (64, 160, 64),  # the floor wins over half of the source
        (576, 160, 288),
        (1023, 160, 480),
        (1024, 256, 512),
        (2047, 256, 768),
        (2048, 384, 1024),
        (4096, 384, 1152),
        (16384, 384, 1152),
    ],
)
def test_targets_by_source_limit(source_tokens, target, cap):
    ours = recipe(max_tokens=source_tokens, crop_budget="visionrl2")
    assert (ours.need.target // 784, ours.max_tokens, ours.min_tokens) == (target, cap, 64)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("source_tokens", [576, 577, 1024, 2048, 16384])
def test_random_regions_get_what_visionrl2_gives_them(family, source_tokens):
    ours, side = recipe(family, source_tokens, crop_budget="visionrl2"), 2 * FAMILY[family].patch
    target = 160 if source_tokens < 1024 else 256 if source_tokens < 2048 else 384
    draw = random.Random(source_tokens)
    for _ in range(400):
        height, width = draw.randint(28, 1500), draw.randint(28, 1500)
        pixels = published(height, width, side, target, source_tokens)
        assert ours.size(height, width) == smart_resize(height, width, side, pixels, pixels)


def test_bounds_that_are_set_replace_those_of_visionrl2():
    ours = recipe(crop_budget="visionrl2", crop_min_tokens=16, crop_max_tokens=100, crop_target_tokens=50)
    assert (ours.need.floor, ours.need.target, ours.need.cap) == (16 * 784, 50 * 784, 100 * 784)


@pytest.mark.parametrize("side", [28, 32])
def test_the_bounds_of_need_hold_for_random_regions(side):
    """Never below the floor, above the cap, or enlarged more than threefold a side beyond what the floor asks for."""
    family = {28: "qwen2_5_vl", 32: "qwen3_vl"}[side]
    draw = random.Random(side)
    for _ in range(4000):
        floor = draw.randint(1, 64)
        cap = draw.randint(2 * floor + 2, 600)
        target = draw.choice([None, draw.randint(1, 600)])
        height, width = draw.randint(28, 2000), draw.randint(28, 2000)
        bounds = {"crop_min_tokens": floor, "crop_max_tokens": cap, "crop_target_tokens": target}
        rows, columns = recipe(family, **bounds).tokens(height, width)
        tokens, native = rows * columns, height * width / side**2
        assert floor <= tokens <= cap
        if 9 * native >= 2 * floor + 2:
            assert rows * side <= 3 * height and columns * side <= 3 * width
        wanted = max(floor, min(cap, max(native, min(9 * native, target or cap))))
        stretch = math.sqrt(wanted / native) / side
        if min(height, width) * stretch >= 1:  # whole tokens next to the wanted size, in the region's own shape
            assert abs(rows - height * stretch) < 1 and abs(columns - width * stretch) < 1


def test_the_cap_wins_where_no_whole_size_lies_between_the_bounds():
    draw = random.Random(4)
    for _ in range(1000):
        bound = draw.randint(1, 300)
        ours = recipe(crop_min_tokens=bound, crop_max_tokens=bound)
        assert bound / 4 <= math.prod(ours.tokens(draw.randint(28, 2000), draw.randint(28, 2000))) <= bound


def test_need_is_the_native_size_between_target_and_cap():
    ours = recipe(crop_min_tokens=4, crop_target_tokens=20, crop_max_tokens=100)
    for rows, columns in ((5, 5), (10, 10), (3, 9), (4, 20)):
        assert ours.tokens(28 * rows, 28 * columns) == (rows, columns)


def test_need_by_hand():
    ours = recipe(crop_min_tokens=4, crop_max_tokens=100)
    assert ours.tokens(28, 28) == (3, 3)  # threefold
    assert ours.tokens(28 * 5, 28 * 5) == (10, 10)  # up to the cap
    assert ours.tokens(28 * 20, 28 * 20) == (10, 10)  # down to it
    assert ours.tokens(28, 28 * 90) == (1, 95)
    assert recipe(crop_min_tokens=30, crop_max_tokens=100).tokens(28, 28) in {(5, 6), (6, 5)}  # the floor wins
    assert recipe(crop_min_tokens=30, crop_max_tokens=30).tokens(280, 280) in {(5, 6), (6, 5), (5, 5)}


def test_long_strips_are_squeezed_to_the_cap():
    """One token high and 150 long would be five times the cap."""
    assert recipe(crop_min_tokens=4, crop_max_tokens=30).tokens(28, 28 * 150) == (1, 30)
    assert recipe(crop_min_tokens=4, crop_max_tokens=30).tokens(28 * 150, 28) == (30, 1)


def test_need_never_makes_more_tokens_than_the_fixed_budget_allows():
    draw = random.Random(3)
    for _ in range(500):
        height, width = draw.randint(28, 1500), draw.randint(28, 1500)
        high = draw.randint(10, 400)
        bounds = {"crop_min_tokens": 1, "crop_max_tokens": high}
        fixed, need = recipe(crop_budget="fixed", **bounds), recipe(**bounds)
        assert math.prod(need.tokens(height, width)) <= max(high, math.prod(fixed.tokens(height, width)))


@pytest.mark.parametrize(
    ("options", "max_tokens", "expected"),
    [
        ({}, 576, (64, 576, 576)),
        ({}, 40, (40, 40, 40)),
        ({"crop_max_tokens": 100}, 576, (64, 100, 100)),
        ({"crop_max_tokens": 100}, None, (64, 100, 100)),
        ({"crop_target_tokens": 160}, 576, (64, 160, 576)),
        ({"crop_min_tokens": 700}, 576, (700, 700, 700)),
    ],
)
def test_what_is_left_open_follows_from_the_coarse_budget(options, max_tokens, expected):
    need = recipe(max_tokens=max_tokens, **options).need
    assert (need.floor // 784, need.target // 784, need.cap // 784) == expected


def test_unknown_budgets_are_an_error():
    with pytest.raises(InputError, match="the crop's budget is unknown"):
        recipe(max_tokens=None)
    with pytest.raises(InputError, match="takes target and cap from max_tokens .*, which is not set"):
        recipe(max_tokens=None, crop_budget="visionrl2", crop_max_tokens=9)
    given = {"crop_max_tokens": 90, "crop_target_tokens": 70}
    assert recipe(max_tokens=None, crop_budget="visionrl2", **given).max_tokens == 90


@pytest.mark.parametrize("budget", ["need", "visionrl2"])
def test_extreme_regions_are_crop_errors(budget):
    with pytest.raises(CropError, match="1 × 201 pixels"):
        recipe(crop_budget=budget).size(1, 201)


@pytest.mark.parametrize("budget", ["need", "visionrl2"])
def test_crops_have_the_size_that_the_recipe_says(budget):
    source, ours = random_source(300, 400, 0), recipe(crop_budget=budget)
    for box in ((0, 0, 30, 30), (10, 20, 200, 90), (0, 0, 400, 300)):
        crop = cut_crop(source, box, ours)
        assert crop.token_grid == ours.tokens(box[3] - box[1], box[2] - box[0])
        assert len(crop.pixel_values) == 4 * crop.tokens


def one_row(family: str) -> dict:
    return make_inputs(family, [Row(["look ", None, " here"], [(3, 4)], 1)])


def report_of(model, **options):
    inputs = one_row(model.config.vlm_config.model_type)
    return model.generate(**inputs, max_new_tokens=1, return_zoom_reports=True, **options).zoom_reports[0]


def expected_tokens(model, report, **options) -> int:
    x0, y0, x1, y1 = report.box
    return math.prod(crop_recipe(model.config, ZoomOptions(**options)).tokens(y1 - y0, x1 - x0))


@pytest.mark.parametrize("family", NATIVE)
def test_the_budget_in_every_place(family, tmp_path):
    """Config, preset, generation config and call, the last one winning; saved and loaded."""
    need = {"crop_budget": "need", "crop_min_tokens": 2, "crop_target_tokens": 18, "crop_max_tokens": 60}
    model = tiny_model(family, presets={"need": need})
    fixed = report_of(model, **always())
    expected = expected_tokens(model, fixed, **need)
    assert expected != fixed.crop_tokens
    assert report_of(model, **always(), **need).crop_tokens == expected
    assert report_of(model, **always(), effort="need").crop_tokens == expected
    settings = GenerationConfig(**always(), **need, return_zoom_reports=True, max_new_tokens=1)
    output = model.generate(**one_row(family), generation_config=settings)
    assert output.zoom_reports[0].crop_tokens == expected
    output = model.generate(**one_row(family), generation_config=settings, crop_target_tokens=45)
    wider = expected_tokens(model, fixed, **{**need, "crop_target_tokens": 45})
    assert output.zoom_reports[0].crop_tokens == wider > expected
    for name, value in need.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in need} == need
    assert report_of(loaded, **always()).crop_tokens == expected
    usual = {**dict.fromkeys(need), "crop_min_tokens": 4, "crop_max_tokens": 24, "crop_budget": "fixed"}
    assert report_of(loaded, **always(), **usual).crop_tokens == fixed.crop_tokens


def test_visionrl2_reaches_the_crop():
    model = tiny_model("qwen2_5_vl", max_tokens=300)
    report = report_of(model, **always(), crop_budget="visionrl2")
    x0, y0, x1, y1 = report.box
    pixels = published(y1 - y0, x1 - x0, 28, 160, 300)
    height, width = smart_resize(y1 - y0, x1 - x0, 28, pixels, pixels)
    assert report.crop_tokens == height * width // 784


@pytest.mark.parametrize("place", ["call", "generation config", "preset"])
def test_a_target_without_effect_is_refused(place):
    target = {"crop_target_tokens": 8}
    with pytest.raises(InputError, match="crop_target_tokens has no effect with crop_budget='fixed'"):
        if place == "preset":
            model = tiny_model("qwen2_5_vl")
            model.config.presets = {"small": target}
            report_of(model, **always(), effort="small")
        elif place == "call":
            report_of(shared_model("qwen2_5_vl"), **always(), **target)
        else:
            report_of(shared_model("qwen2_5_vl"), generation_config=GenerationConfig(**target), **always())


def test_a_stored_target_waits_for_the_calls_that_want_one():
    model = tiny_model("qwen2_5_vl", crop_target_tokens=7, crop_min_tokens=2, crop_max_tokens=40)
    fixed = report_of(model, **always())
    need = report_of(model, **always(), crop_budget="need")
    bounds = {"crop_min_tokens": 2, "crop_max_tokens": 40}
    assert fixed.crop_tokens == expected_tokens(model, fixed, **bounds)
    assert need.crop_tokens == expected_tokens(model, need, crop_budget="need", crop_target_tokens=7, **bounds)
    settings = GenerationConfig(crop_budget="need", crop_target_tokens=9)
    again = report_of(model, **always(), generation_config=settings, crop_budget="fixed")
    assert again.crop_tokens == fixed.crop_tokens


def test_a_preset_with_a_target_without_effect_is_refused():
    presets = {"small": {"crop_target_tokens": 8}}
    with pytest.raises(ValueError, match="preset 'small': crop_target_tokens has no effect"):
        QZoomConfig(vlm_config("qwen2_5_vl"), branch_layer=3, branch_depth=2, presets=presets)
    QZoomConfig(vlm_config("qwen2_5_vl"), branch_layer=3, branch_depth=2, presets=presets, crop_budget="need")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NATIVE])
@pytest.mark.parametrize("options", [{"crop_budget": "need"}, {"crop_budget": "visionrl2"}, {"crop_target_tokens": 8}])
def test_fixed_squares_have_no_such_budget(family, options):
    with pytest.raises(UnsupportedError, match="crop_budget do not apply: crops of this backbone always have"):
        report_of(shared_model(family), **always(), **options)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("budget", ["need", "visionrl2"])
def test_given_boxes_are_cropped_by_the_budget_too(family, budget):
    """Training on fused sequences takes the same crops."""
    bounds = {"crop_budget": budget, "crop_min_tokens": 2, "crop_target_tokens": 7, "crop_max_tokens": 40}
    model = tiny_model(family, **bounds)
    inputs, box = one_row(family), (3, 5, 60, 50)
    crop = math.prod(crop_recipe(model.config, ZoomOptions(**bounds)).tokens(45, 57))
    output = model(**inputs, labels=inputs["input_ids"], zoom_boxes=[box])
    assert output.logits.shape[1] == inputs["input_ids"].shape[1] + crop + 2
