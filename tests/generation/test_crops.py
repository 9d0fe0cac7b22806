"""Crops made on the device, against the backbones' own image processors."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from modeling_qzoom.backbone_grids_qzoom import FixedGrid, NativeGrid
from modeling_qzoom.errors_qzoom import CropError
from modeling_qzoom.zoom_crops_qzoom import CropRecipe, cut_crop
from tests.families import FAMILY
from tests.generation_fixtures import always, record_crops, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, random_source, tiny_model


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GREY_LEVEL = 1 / 255 / min(STD)


def native(patch: int = 14, low: int = 4, high: int = 64) -> CropRecipe:
    return CropRecipe(NativeGrid(patch, 2, 2), low, high, MEAN, STD)


def square(side: int) -> CropRecipe:
    return CropRecipe(FixedGrid(14, 1, 1, side), 1, 1, MEAN, STD)


def as_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def sharp_source(height: int, width: int, seed: int) -> torch.Tensor:
    """Noise and smooth parts side by side: the hardest and the easiest content for a resampler."""
    source = random_source(height, width, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, source.shape, generator=generator, dtype=torch.uint8)
    source[:, : height // 2] = noise[:, : height // 2]
    return source


@pytest.fixture
def columns_first(monkeypatch):
    """PIL before version 13 and torchvision always resize columns first; PIL 13 chooses by size, which shows at sharp
    edges."""
    resize = Image.Image.resize

    def two_passes(image, size, resample=None, *args, **kwargs):
        return resize(resize(image, (size[0], image.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", two_passes)


@pytest.mark.parametrize("patch", [14, 16])
def test_crops_of_pictures_match_the_image_processor(patch):
    check_native_crops(patch, random_source)


@pytest.mark.parametrize("patch", [14, 16])
def test_crops_of_noise_match_the_image_processor(patch, columns_first):
    check_native_crops(patch, sharp_source)


def check_native_crops(patch, make_source):
    """Same grid, and pixels within one grey level, for random boxes and budgets."""
    draw = random.Random(patch)
    worst, total, count = 0.0, 0.0, 0
    for seed in range(40):
        height, width = draw.randint(40, 500), draw.randint(40, 500)
        source = make_source(height, width, seed)
        x0, y0 = draw.randrange(width - 28), draw.randrange(height - 28)
        box = x0, y0, draw.randint(x0 + 28, width), draw.randint(y0 + 28, height)
        low = draw.choice([1, 4, 16])
        recipe = native(patch, low, low * draw.choice([1, 4, 12]))
        crop = cut_crop(source, box, recipe)
        patches, grid = crop.pixel_values, crop.patch_grid
        side = (2 * patch) ** 2
        processor = Qwen2VLImageProcessor(
            patch_size=patch,
            size={"shortest_edge": recipe.min_tokens * side, "longest_edge": recipe.max_tokens * side},
            image_mean=MEAN,
            image_std=STD,
        )
        expected = processor(as_pil(source).crop(box), return_tensors="pt")
        assert [list(grid)] == expected["image_grid_thw"].tolist()
        assert patches.shape == expected["pixel_values"].shape
        difference = (patches - expected["pixel_values"]).abs()
        worst, total, count = (
            max(worst, float(difference.max())),
            total + float(difference.sum()),
            count + patches.numel(),
        )
    assert worst <= 1.01 * GREY_LEVEL
    assert total / count < 0.25 * GREY_LEVEL


@pytest.mark.parametrize("side", [56, 336])
def test_square_crops_match_resize_and_pad(side, columns_first):
    """The longer side fills the square, the rest is the mean colour, the region in the middle."""
    draw = random.Random(side)
    for seed in range(15):
        height, width = draw.randint(60, 600), draw.randint(60, 600)
        source = sharp_source(height, width, seed)
        x0, y0 = draw.randrange(width - 28), draw.randrange(height - 28)
        box = x0, y0, draw.randint(x0 + 28, width), draw.randint(y0 + 28, height)
        crop = cut_crop(source, box, square(side))
        pixels, grid = crop.pixel_values, crop.patch_grid
        assert grid is None and pixels.shape == (1, 3, side, side) and pixels.dtype == torch.float32
        region = as_pil(source).crop(box)
        scale = side / max(region.size)
        size = [max(1, round(extent * scale)) for extent in region.size]
        resized = region.resize(size, Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (side, side), tuple(round(255 * value) for value in MEAN))
        canvas.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
        expected = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
        assert ((pixels[0] - (expected - mean) / std).abs()).max() <= 1.01 * GREY_LEVEL


def test_padding_of_a_square_crop_is_the_mean_colour():
    crop = cut_crop(random_source(40, 80, 0), (0, 0, 80, 40), square(56))
    pixels = crop.pixel_values
    assert pixels[0, :, :14].abs().max() == 0 and pixels[0, :, 42:].abs().max() == 0
    assert pixels[0, :, 14:42].abs().min() > 0


@pytest.mark.parametrize("patch", [14, 16])
def test_sizes_follow_the_resize_rule_of_the_backbone(patch):
    draw = random.Random(1)
    side = 2 * patch
    for _ in range(3000):
        height, width = draw.randint(1, 3000), draw.randint(1, 3000)
        low = draw.randint(1, 300)
        high = draw.randint(low, 1000)
        recipe = native(patch, low, high)
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(CropError, match="200"):
                recipe.size(height, width)
            continue
        expected = smart_resize(height, width, side, low * side**2, high * side**2)
        assert recipe.size(height, width) == expected


def test_budgets_hold_up_to_the_rounding_of_a_side():
    """A long thin region costs at most the ceiling of its short side more than the budget."""
    draw = random.Random(2)
    for _ in range(500):
        height, width = draw.randint(28, 2000), draw.randint(28, 2000)
        low = draw.randint(1, 200)
        high = draw.randint(2 * low, 1000)
        rows, columns = (extent // 28 for extent in native(14, low, high).size(height, width))
        assert rows * columns >= low * (1 - 1 / min(rows, columns)) - 1
        assert rows * columns <= high or min(rows, columns) == 1


def test_native_size_is_kept_within_the_budget():
    assert native(14, 4, 64).size(280, 140) == (280, 140)
    assert native(14, 4, 64).size(290, 130) == (280, 140)
    assert native(14, 4, 50).size(2800, 1400) == (280, 140)
    assert native(14, 50, 64).size(28, 14) == (280, 140)


@pytest.mark.parametrize("box", [(10, 10, 10, 40), (10, 40, 40, 10), (90, 10, 120, 40)])
def test_regions_without_area_are_crop_errors(box):
    with pytest.raises(CropError, match="outside the image of 80 × 60"):
        cut_crop(random_source(60, 80, 0), box, native())


def test_extreme_regions_are_crop_errors_for_native_crops_only():
    source = torch.zeros(3, 1, 201, dtype=torch.uint8)
    with pytest.raises(CropError, match="1 × 201 pixels"):
        cut_crop(source, (0, 0, 201, 1), native())
    assert cut_crop(source, (0, 0, 200, 1), native()).patch_grid[1] == 2
    assert cut_crop(source, (0, 0, 201, 1), square(56)).pixel_values.shape == (1, 3, 56, 56)


def test_token_grid():
    assert native().grid.crop_tokens((84, 140)) == (3, 5)
    assert square(56).grid.crop_tokens((56, 28)) == (4, 4)


def test_patches_are_ordered_by_token():
    """Each pixel carries its own position; patch 1 lies right of patch 0, patch 2 below it, patch 4 starts token 1."""
    rows = torch.arange(56, dtype=torch.uint8).view(56, 1).expand(56, 84)
    columns = torch.arange(84, dtype=torch.uint8).view(1, 84).expand(56, 84)
    source = torch.stack([rows, columns, torch.zeros_like(rows)])
    recipe = CropRecipe(NativeGrid(14, 2, 2), 1, 100, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    crop = cut_crop(source, (0, 0, 84, 56), recipe)
    patches, grid = crop.pixel_values, crop.patch_grid
    assert grid == (1, 4, 6) and patches.dtype == torch.float32
    values = (patches * 255).round().view(24, 3, 2, 14, 14)
    corners = values[:, :2, 0, 0, 0].int().tolist()  # (row, column) of every patch's first pixel
    assert corners[:5] == [[0, 0], [0, 14], [14, 0], [14, 14], [0, 28]]
    assert corners[12] == [28, 0]
    assert values[:, :, 0].equal(values[:, :, 1])  # a still image: both frames alike


def test_source_is_not_written_to():
    source = random_source(60, 80, 0)
    before = source.clone()
    cut_crop(source, (5, 5, 60, 50), native())
    assert source.equal(before)


def test_crops_stay_on_the_source_s_device():
    """On a device without data, anything that looked at pixel values or left for the host would raise."""
    source = torch.zeros(3, 300, 400, dtype=torch.uint8, device="meta")
    crop = cut_crop(source, (10, 20, 300, 200), native())
    patches, grid = crop.pixel_values, crop.patch_grid
    assert patches.device.type == "meta" and len(patches) == grid[1] * grid[2]
    assert cut_crop(source, (10, 20, 300, 200), square(56)).pixel_values.device.type == "meta"


def test_a_default_device_does_not_leak_into_crops():
    source = random_source(60, 80, 0)
    with torch.device("meta"):
        crop = cut_crop(source, (0, 0, 80, 60), native())
        patches = crop.pixel_values
    assert patches.device.type == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_models_take_float32_patches(family):
    """Crops are made in float32 (bf16 cannot hold 256 grey levels around a mean) and cast by the vision tower."""
    model = tiny_model(family).to(torch.bfloat16)
    inputs = make_inputs(family, [Row(["a", None, "b"], [(3, 4)], 1)])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with record_crops() as crops:
        output = model.generate(**inputs, **always(), max_new_tokens=3, return_zoom_reports=True)
    assert crops[0].dtype == torch.float32
    report = output.zoom_reports[0]
    assert report.zoomed and report.region_logits.dtype == report.heatmap.dtype == torch.float32
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(("low", "high"), [(1, 4), (6, 6), (20, 40)])
def test_generate_keeps_to_the_crop_budget(family, low, high):
    inputs = make_inputs(family, [Row(["a", None, "b"], [(4, 4)], 1), Row([None, "c"], [(2, 5)], 2)])
    budget = {"crop_min_tokens": low, "crop_max_tokens": high}
    output = shared_model(family).generate(**inputs, **always(), **budget, max_new_tokens=1, return_zoom_reports=True)
    for report in output.zoom_reports:
        x0, y0, x1, y1 = report.box
        side = 2 * FAMILY[family].patch
        height, width = smart_resize(y1 - y0, x1 - x0, side, low * side**2, high * side**2)
        assert report.crop_tokens == height * width // side**2


def test_without_a_crop_budget_the_coarse_one_holds():
    inputs = make_inputs("qwen2_5_vl", [Row(["a", None, "b"], [(4, 4)], 1)])
    model = tiny_model("qwen2_5_vl", min_tokens=5, max_tokens=6)
    report = model.generate(**inputs, **always(), max_new_tokens=1, return_zoom_reports=True).zoom_reports[0]
    x0, y0, x1, y1 = report.box
    assert report.crop_tokens == torch.tensor(smart_resize(y1 - y0, x1 - x0, 28, 5 * 784, 6 * 784)).prod() // 784
