"""Fused sequences by hand: which columns are kept, what is inserted, and at which positions."""

import pytest
import torch

from modeling_qzoom.prompt_qzoom import ImageSpan, image_spans
from modeling_qzoom.rows_qzoom import Positions, length_mask, pad_left
from modeling_qzoom.zoom_fusion_qzoom import crop_positions, fuse_row, plain_row
from tests.generation_fixtures import always, shared_model
from tests.tiny import FAMILIES, Row, make_inputs


IMAGE, BEFORE, AFTER, WORD = 7, 8, 9, 1


def prompt(*parts) -> tuple[torch.Tensor, torch.Tensor, list[ImageSpan]]:
    """Ids, (3, n) M-RoPE positions and image spans of numbers of words and (height, width) images with markers."""
    ids, columns, spans, position = [], [], [], 0
    for part in parts:
        if isinstance(part, int):
            ids += [WORD] * part
            columns += [(position + step,) * 3 for step in range(part)]
            position += part
            continue
        height, width = part
        ids.append(BEFORE)
        columns.append((position,) * 3)
        spans.append(ImageSpan(len(ids), len(ids) + height * width, part, len(spans)))
        ids += [IMAGE] * (height * width)
        columns += [(position + 1, position + 1 + i, position + 1 + j) for i in range(height) for j in range(width)]
        position += 1 + max(height, width)
        ids.append(AFTER)
        columns.append((position,) * 3)
        position += 1
    return torch.tensor(ids), torch.tensor(columns).T, spans


def fuse(ids, positions, span, box, crop_grid, alignment="continuous", markers=(BEFORE, AFTER)):
    return fuse_row(
        0, ids, torch.ones_like(ids), positions, span, box, crop_grid, alignment=alignment, markers=markers
    )


def column(row, index) -> list[float]:
    return row.positions[:, index].tolist()


@pytest.mark.parametrize("alignment", ["continuous", "sequential"])
def test_position_table_of_the_authors(alignment):
    """Two words, a 4 × 5 image at p0 = 3, three words; box (1, 1, 4, 3); crop of 3 × 5 tokens.

    E = p0 + max(4, 5) = 8 is the end marker of the coarse image, m = max(3, 5) = 5.
    """
    ids, positions, (span,) = prompt(2, (4, 5), 3)
    row = fuse(ids, positions, span, (1, 1, 4, 3), (3, 5), alignment)
    assert row.prefix.tolist() == list(range(2 + 1 + 20 + 1)) and row.suffix.tolist() == [24, 25, 26]
    assert (row.crop, row.block, row.length, row.has_markers) == (15, 17, 24 + 17 + 3, True)
    assert row.positions.dtype == torch.float32
    assert row.positions[:, :24].equal(positions[:, :24].float())
    assert column(row, 23) == [8] * 3
    assert column(row, 24) == [9] * 3  # start marker: E + 1
    crop = row.positions[:, 25:40].unflatten(1, (3, 5))
    assert (crop[0] == 10).all()  # t = E + 2
    if alignment == "continuous":
        # rows from p0 + y0 = 4 to p0 + y1 - 1 = 5, columns from p0 + x0 = 4 to p0 + x1 - 1 = 6
        assert crop[1, :, 0].tolist() == [4, 4.5, 5]
        assert crop[2, 0].tolist() == [4, 4.5, 5, 5.5, 6]
    else:
        assert crop[1, :, 0].tolist() == [10, 11, 12]
        assert crop[2, 0].tolist() == [10, 11, 12, 13, 14]
    assert (crop[1] == crop[1, :, :1]).all() and (crop[2] == crop[2, :1]).all()
    assert column(row, 40) == [15] * 3  # end marker: E + m + 2
    # every later token: old + m + 2
    assert row.positions[:, 41:].equal(positions[:, 24:].float() + 7)
    assert column(row, 41) == [16] * 3


def test_sequential_positions_are_those_of_a_second_image():
    ids, positions, (span,) = prompt(2, (4, 5), 3)
    row = fuse(ids, positions, span, (1, 1, 4, 3), (3, 5), "sequential")
    _, two_images, _ = prompt(2, (4, 5), (3, 5), 3)
    assert row.positions.equal(two_images.float())


def test_tall_images_count_their_height():
    ids, positions, (span,) = prompt(1, (6, 2), 2)
    row = fuse(ids, positions, span, (0, 0, 2, 6), (4, 1))
    assert column(row, 15) == [9] * 3  # start marker: p0 = 2, E = 8
    assert column(row, 15 + 1 + 4) == [14] * 3  # end marker: E + m + 2, m = 4
    assert column(row, -1) == [16] * 3


def test_zooming_into_the_second_image_keeps_everything_before_it():
    ids, positions, (first, second) = prompt(1, (2, 2), 2, (3, 3), 4)
    row = fuse(ids, positions, second, (0, 0, 3, 3), (2, 2))
    assert row.prefix.tolist() == list(range(second.end + 1))
    assert len(row.suffix) == 4
    origin = float(positions[0, second.start])
    assert row.positions[1, len(row.prefix) + 1].item() == origin
    assert row.positions[1, len(row.prefix) + 4].item() == origin + 2
    assert column(row, -1) == [float(positions[0, -1]) + 4] * 3


def test_zooming_into_the_first_of_two_images_shifts_the_second():
    ids, positions, (first, second) = prompt(1, (2, 2), 2, (3, 3), 4)
    row = fuse(ids, positions, first, (0, 0, 2, 2), (2, 3))
    assert row.prefix.tolist() == list(range(first.end + 1))
    assert row.suffix.tolist() == list(range(first.end + 1, len(ids)))
    assert row.positions[:, -len(row.suffix) :].equal(positions[:, first.end + 1 :].float() + 5)


def test_padding_is_no_part_of_the_sequence():
    ids, positions, (span,) = prompt(2, (2, 3), 2)
    padded = torch.cat([torch.zeros(4, dtype=ids.dtype), ids])
    shifted = ImageSpan(span.start + 4, span.end + 4, span.grid, 0)
    padded_positions = torch.cat([torch.zeros(3, 4, dtype=positions.dtype), positions], dim=1)
    valid = torch.tensor([0] * 4 + [1] * len(ids))
    options = {"alignment": "continuous", "markers": (BEFORE, AFTER)}
    row = fuse_row(3, padded, valid, padded_positions, shifted, (0, 0, 1, 1), (1, 2), **options)
    alone = fuse(ids, positions, span, (0, 0, 1, 1), (1, 2))
    assert row.row == 3 and row.prefix.min() == 4
    assert row.positions.equal(alone.positions) and row.length == alone.length


def test_prompts_without_an_end_marker():
    """The crop then starts right behind the image's last token."""
    ids, positions, (span,) = prompt(1, (2, 3), 2)
    keep = torch.arange(len(ids)) != span.end
    ids, positions = ids[keep], positions[:, keep].clone()
    positions[:, span.end :] -= 1  # E is where the next word stands now
    row = fuse(ids, positions, span, (0, 0, 3, 2), (2, 2))
    assert row.prefix.tolist() == list(range(span.end))
    assert column(row, span.end) == [5] * 3  # start marker at E = p0 + 3
    assert row.positions[0, span.end + 1].item() == 6
    assert column(row, span.end + 5) == [8] * 3
    assert column(row, span.end + 6) == [9] * 3  # the first word: 5 + m + 2


def test_prompts_that_end_with_the_image():
    ids, positions, (span,) = prompt(2, (2, 2))
    row = fuse(ids, positions, span, (0, 0, 2, 2), (2, 2))
    assert len(row.suffix) == 0 and row.length == len(ids) + 6
    assert column(row, -1) == [float(positions[0, -1]) + 4] * 3
    cut = fuse(ids[:-1], positions[:, :-1], span, (0, 0, 2, 2), (2, 2))
    assert cut.prefix.tolist() == list(range(span.end)) and len(cut.suffix) == 0


def test_plain_positions_count_on():
    """LLaVA: crop tokens alone, one position each, no markers."""
    ids = torch.tensor([WORD, IMAGE, IMAGE, IMAGE, IMAGE, WORD, WORD])
    span = ImageSpan(1, 5, (2, 2), 0)
    row = fuse(ids, torch.arange(7)[None], span, (0, 0, 1, 1), (2, 2), "sequential", None)
    assert (row.block, row.crop, row.has_markers) == (4, 4, False)
    assert row.prefix.tolist() == [0, 1, 2, 3, 4] and row.suffix.tolist() == [5, 6]
    assert row.positions.tolist() == [list(range(11))] and row.positions.dtype == torch.float32


def test_fractional_boxes_place_tokens_between_cells():
    placed = crop_positions(20, 10, (0.25, 0.5, 2.75, 2.0), (2, 3), "continuous")
    assert placed[1].tolist() == [10.5] * 3 + [11.0] * 3
    assert placed[2].tolist() == [10.25, 11.0, 11.75] * 2
    assert (placed[0] == 20).all()


def test_boxes_narrower_than_a_cell_have_one_coordinate():
    """The cell coordinate of their centre: 1.6 … 2.0 is centred on 1.8, which is 1.3 in cell coordinates."""
    placed = crop_positions(20, 10, (1.6, 0, 2.0, 1), (1, 3), "continuous")
    torch.testing.assert_close(placed[2], torch.full((3,), 11.3))
    assert (placed[1] == 10).all()


def test_single_cell_boxes_and_single_token_crops():
    assert crop_positions(5, 1, (2, 3, 3, 4), (2, 2), "continuous")[1:].tolist() == [[4] * 4, [3] * 4]
    assert crop_positions(5, 1, (2, 0, 6, 4), (1, 1), "continuous").tolist() == [[5], [1], [3]]


def test_spread_is_float32_and_hits_its_ends():
    placed = crop_positions(900, 700, (0, 0, 30, 7), (7, 41), "continuous")
    assert placed.dtype == torch.float32
    assert placed[2, 0] == 700 and placed[2, 40] == 729


def test_plain_rows_are_all_prefix():
    positions = torch.arange(5).expand(3, -1)
    row = plain_row(1, torch.tensor([0, 0, 1, 1, 1]), positions)
    assert row.prefix.tolist() == [2, 3, 4] and row.length == 3 and row.block == 0
    assert row.positions.equal(positions[:, 2:].float())


def test_rows_are_padded_on_the_left():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    assert pad_left(rows, 3).tolist() == [[0, 1, 2], [0, 0, 3]]
    assert length_mask([2, 1], 3, "cpu").tolist() == [[0, 1, 1], [0, 0, 1]]
    stacked = Positions.stack([torch.ones(3, 2), 2 * torch.ones(3, 1)], 2).for_decoder()
    assert stacked.shape == (3, 2, 2) and stacked[0].tolist() == [[1, 1], [0, 2]]
    assert Positions.stack([row[None] for row in rows], 2).for_decoder().tolist() == [[1, 2], [0, 3]]


def test_image_spans_by_row():
    ids = torch.tensor([[1, 7, 7, 7, 7, 1, 7, 7], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 7, 7, 1]])
    spans = image_spans(ids, IMAGE, [(2, 2), (1, 2), (2, 1)])
    assert [[(span.start, span.end, span.index) for span in row] for row in spans] == [
        [(1, 5, 0), (6, 8, 1)],
        [],
        [(5, 7, 2)],
    ]


def test_adjacent_images_are_told_apart_by_their_grids():
    spans = image_spans(torch.full((1, 6), IMAGE), IMAGE, [(2, 2), (1, 2)])
    assert [(span.start, span.end) for span in spans[0]] == [(0, 4), (4, 6)]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([[1, 7, 7, 1]], [(1, 3)], "row 0, image 0: an image of 1 × 3 tokens needs 3 image tokens .* has 2"),
        ([[1, 1], [7, 7]], [(1, 1)], "row 1, image 1: the prompt has image tokens left but only 1 images"),
        ([[7, 1, 7]], [(1, 2)], "row 0, image 0.*in a row"),
        ([[7, 1, 1]], [(1, 1), (1, 1)], "2 images were given, the prompts hold the tokens of 1"),
    ],
)
def test_image_tokens_that_do_not_fit(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        image_spans(torch.tensor(ids), IMAGE, grids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", ["second image", "text first", "image last", "turns"])
def test_every_prompt_shape_zooms_and_equals_itself_in_a_batch(family, shape):
    """Several images, text after, before or not at all: a padded batch gives what the row gives alone."""
    rows = {
        "second image": Row([None, " and ", None, " differ?"], [(2, 3), (4, 4)], 1),
        "text first": Row(["long text in front of it ", None, "?"], [(3, 3)], 2),
        "image last": Row(["what is it ", None], [(3, 4)], 3),
        "turns": Row(["a", None, " answer. ", "b?", None, " and then?"], [(4, 2), (2, 2)], 4),
    }
    model, row = shared_model(family), rows[shape]
    other = Row(["x" * 60, None, "y" * 10], [(4, 5)], 7)
    settings = {**always(), "max_new_tokens": 4, "output_logits": True, "return_zoom_reports": True}
    alone = model.generate(**make_inputs(family, [row]), **settings)
    batch = model.generate(**make_inputs(family, [other, row]), **settings)
    report = alone.zoom_reports[0]
    assert report.zoomed and report.box == batch.zoom_reports[1].box
    assert report.image_index == batch.zoom_reports[1].image_index
    assert batch.zoom_reports[1].coarse_tokens == report.coarse_tokens
    torch.testing.assert_close(batch.logits[0][1], alone.logits[0][0], atol=1e-4, rtol=0)
