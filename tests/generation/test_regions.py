"""Heat map → box → source pixels, against numbers worked out by hand."""

import math
import random

import pytest
import torch

from modeling_qzoom.zoom_regions_qzoom import (
    blur,
    box_to_pixels,
    foreground_box,
    no_artifacts,
    pixels_to_cells,
    region_heatmap,
    zero_first_token_cells,
    zero_page_corner,
)


SIDE = 1 / (2 + math.exp(0.5))  # normalised tap of a Gaussian with sigma 1 at distance 1
CENTRE = 1 - 2 * SIDE


def single(height: int, width: int, row: int, column: int) -> torch.Tensor:
    cells = torch.zeros(height, width)
    cells[row, column] = 1
    return cells


def test_an_isolated_cell_keeps_a_fifth_of_its_value():
    blurred = blur(single(5, 5, 2, 2))
    assert blurred[2, 2] == pytest.approx(0.204, abs=5e-4)
    assert blurred[2, 2] == pytest.approx(CENTRE**2)
    assert blurred[2, 1] == pytest.approx(CENTRE * SIDE)
    assert blurred[1, 1] == pytest.approx(SIDE**2)
    assert blurred[0].abs().max() == 0 and blurred[:, 4].abs().max() == 0


def test_blur_mirrors_at_the_border_without_repeating_the_edge():
    # the cell beside the corner counts twice per axis, once for itself and once mirrored
    assert blur(single(4, 4, 1, 1))[0, 0] == pytest.approx(4 * SIDE**2)
    assert blur(single(4, 4, 0, 0))[0, 0] == pytest.approx(CENTRE**2)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 2), (1, 1), (2, 2), (3, 7)])
def test_blur_keeps_constant_maps(shape):
    torch.testing.assert_close(blur(torch.full(shape, 0.3)), torch.full(shape, 0.3))


def test_grids_one_cell_high_or_wide_blur_along_their_length_only():
    row = blur(single(1, 5, 0, 2))
    torch.testing.assert_close(row, torch.tensor([[0, SIDE, CENTRE, SIDE, 0]]))
    torch.testing.assert_close(blur(single(5, 1, 2, 0)), row.T)
    assert blur(torch.ones(1, 1)) == 1


def test_corner_rule_only_above_256_cells():
    ones = torch.ones(16, 16)
    assert zero_page_corner(ones, None).equal(ones)
    cleaned = zero_page_corner(torch.ones(16, 17), None)
    zeroed = (cleaned == 0).nonzero().tolist()
    assert sorted(map(tuple, zeroed)) == sorted({(row, 0) for row in range(4)} | {(0, column) for column in range(4)})


@pytest.mark.parametrize(("shape", "expected"), [((1, 257), 64), ((257, 1), 64), ((3, 100), 25)])
def test_corner_rule_on_flat_grids(shape, expected):
    """A quarter of a short side is at least one cell."""
    assert int((zero_page_corner(torch.ones(shape), None) == 0).sum()) == expected


def test_corner_rule_leaves_its_input_alone():
    ones = torch.ones(17, 17)
    zero_page_corner(ones, None)
    assert ones.min() == 1


def test_first_token_rule_zeroes_sinks_from_three_quarters_on():
    limit = math.log(3)  # sigmoid 0.75
    first = torch.tensor([[limit + 1e-3, limit - 1e-3, -5.0]])
    cleaned = zero_first_token_cells(torch.full((1, 3), 0.9), first)
    torch.testing.assert_close(cleaned, torch.tensor([[0.0, 0.9, 0.9]]))


def test_artifacts_go_before_the_blur():
    """A zeroed sink does not leak into its neighbours."""
    logits, first = torch.full((5, 5), -20.0), torch.full((5, 5), -20.0)
    logits[2, 2], first[2, 2] = 20, 20
    assert region_heatmap(logits, first, no_artifacts).max() == pytest.approx(CENTRE**2, abs=1e-5)
    assert region_heatmap(logits, first, zero_first_token_cells).max() < 1e-6


def test_heatmap_is_float32_within_the_unit_interval():
    heatmap = region_heatmap(torch.tensor([[30.0, -30.0]], dtype=torch.bfloat16), None, no_artifacts)
    assert heatmap.dtype == torch.float32
    assert heatmap.min() >= 0 and heatmap.max() <= 1


def test_threshold_is_exclusive():
    heatmap = torch.tensor([[0.1, 0.2, 0.3]])
    assert foreground_box(heatmap, 0.2, "absolute") == (2, 0, 3, 1)
    assert foreground_box(heatmap, 0.0, "absolute") == (0, 0, 3, 1)
    assert foreground_box(heatmap, 0.3, "absolute") is None


def test_peak_threshold_is_a_share_of_the_largest_value():
    heatmap = torch.tensor([[0.02, 0.011, 0.009, 0.0]])
    assert foreground_box(heatmap, 0.5, "peak") == (0, 0, 2, 1)
    assert foreground_box(heatmap, 0.5, "absolute") is None
    assert foreground_box(heatmap, 1.0, "peak") is None
    assert foreground_box(torch.zeros(2, 2), 0.0, "peak") is None


def test_two_blobs_share_one_box():
    heatmap = torch.zeros(6, 8)
    heatmap[1, 2] = heatmap[4, 6] = 1
    assert foreground_box(heatmap, 0.5, "absolute") == (2, 1, 7, 5)


def test_foreground_everywhere_is_the_whole_image():
    box = foreground_box(torch.ones(3, 5), 0.1, "absolute")
    assert box == (0, 0, 5, 3)
    assert box_to_pixels(box, (3, 5), (301, 503), 28) == (0, 0, 503, 301)


def test_cells_become_pixels_and_are_truncated():
    # 100 px over 3 columns, 90 px over 4 rows
    assert box_to_pixels((1, 1, 2, 3), (4, 3), (90, 100), 1) == (33, 22, 66, 67)


def test_the_last_pixel_survives_rounding():
    """370 / 23 · 23 is just below 370 in floating point."""
    assert box_to_pixels((0, 0, 23, 1), (1, 23), (100, 370), 28)[2] == 370


def test_small_boxes_grow_about_their_centre():
    assert box_to_pixels((5, 5, 6, 6), (10, 10), (100, 100), 28) == (41, 41, 69, 69)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((0, 0, 1, 1), (0, 0, 28, 28)),  # slides right and down
        ((9, 9, 10, 10), (72, 72, 100, 100)),  # slides left and up
        ((0, 3, 10, 4), (0, 21, 100, 49)),  # one side only
    ],
)
def test_grown_boxes_slide_inside(cells, expected):
    assert box_to_pixels(cells, (10, 10), (100, 100), 28) == expected


def test_images_smaller_than_the_smallest_box_are_taken_whole():
    assert box_to_pixels((1, 1, 2, 2), (4, 4), (20, 17), 28) == (0, 0, 17, 20)
    assert box_to_pixels((0, 0, 1, 1), (1, 1), (1, 1), 28) == (0, 0, 1, 1)
    assert box_to_pixels((2, 0, 3, 1), (1, 4), (10, 200), 28) == (100, 0, 150, 10)


def test_padded_views_are_cut_at_the_image():
    """200 × 100 px padded to a square: the grid covers rows -50 … 150."""
    padded = (0, -50, 200, 150)
    assert box_to_pixels((0, 0, 4, 4), (4, 4), (100, 200), 28, padded) == (0, 0, 200, 100)
    assert box_to_pixels((1, 1, 2, 2), (4, 4), (100, 200), 28, padded) == (50, 0, 100, 50)
    assert box_to_pixels((1, 0, 2, 2), (4, 4), (100, 200), 28, padded) == (50, 0, 100, 50)


def test_a_sliver_of_image_beside_padding_still_grows():
    padded = (0, -45, 200, 155)  # the second row of cells covers pixel rows 5 … 55
    assert box_to_pixels((0, 0, 1, 1), (4, 4), (100, 200), 28, padded) == (0, 0, 50, 28)


@pytest.mark.parametrize("cells", [(0, 0, 4, 1), (0, 3, 4, 4)])
def test_a_box_wholly_in_the_padding_is_none(cells):
    assert box_to_pixels(cells, (4, 4), (100, 200), 28, (0, -50, 200, 150)) is None


def test_center_cropped_views_stay_in_their_part_of_the_image():
    """A 300 × 100 px image whose middle square the grid covers."""
    square = (100, 0, 200, 100)
    assert box_to_pixels((0, 0, 4, 4), (4, 4), (100, 300), 28, square) == (100, 0, 200, 100)
    assert box_to_pixels((1, 2, 3, 4), (4, 4), (100, 300), 28, square) == (125, 50, 175, 100)
    # growing may leave it: those are pixels of the image all the same
    assert box_to_pixels((0, 0, 1, 1), (4, 4), (100, 300), 40, square) == (92, 0, 132, 40)


def test_random_boxes_are_inside_cover_their_cells_and_are_large_enough():
    draw = random.Random(0)
    for _ in range(1000):
        grid = draw.randint(1, 30), draw.randint(1, 30)
        size = draw.randint(1, 700), draw.randint(1, 700)
        x0, y0 = draw.randrange(grid[1]), draw.randrange(grid[0])
        cells = x0, y0, draw.randint(x0 + 1, grid[1]), draw.randint(y0 + 1, grid[0])
        box = box_to_pixels(cells, grid, size, 28)
        assert all(type(value) is int for value in box)
        for start, end, first, last, limit, count in (
            (box[0], box[2], cells[0], cells[2], size[1], grid[1]),
            (box[1], box[3], cells[1], cells[3], size[0], grid[0]),
        ):
            assert 0 <= start < end <= limit
            assert end - start >= min(28, limit) - 1  # truncation may cost a pixel
            # to the pixel, no cell is cut
            assert start <= first * limit / count
            assert end > last * limit / count - 1 - 1e-3  # float32 may put a whole pixel just below itself


def test_random_maps_give_boxes_around_all_their_foreground():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        height, width = torch.randint(1, 20, (2,), generator=generator).tolist()
        logits = 4 * torch.randn(height, width, generator=generator) - 4
        heatmap = region_heatmap(logits, None, zero_page_corner)
        box = foreground_box(heatmap, 0.3, "absolute")
        inside = heatmap > 0.3
        if box is None:
            assert not inside.any()
            continue
        x0, y0, x1, y1 = box
        assert inside.sum() == inside[y0:y1, x0:x1].sum()
        assert inside[y0:y1, x0].any() and inside[y0:y1, x1 - 1].any()
        assert inside[y0, x0:x1].any() and inside[y1 - 1, x0:x1].any()


@pytest.mark.parametrize("grid_box", [None, (0, -50, 200, 150), (50, 0, 150, 100)])
def test_pixels_to_cells_inverts(grid_box):
    cells = pixels_to_cells((60, 30, 125, 70), (4, 5), (100, 200), grid_box)
    assert box_to_pixels(cells, (4, 5), (100, 200), 1, grid_box) == (60, 30, 125, 70)
