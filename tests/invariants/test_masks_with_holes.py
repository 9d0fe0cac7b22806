"""Masks that hide tokens inside a prompt are kept: in every row of a batch, through zooming, decoding and training."""

import pytest
import torch

from tests.families import FAMILY
from tests.generation_fixtures import always, shared_model
from tests.invariants.test_prefix_reuse import CropSpy, fused_prompt
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs


families = pytest.mark.parametrize("family", FAMILIES)
mrope_families = pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILY[family].has_budget])
NEW_TOKENS = 4
ROWS = [
    Row(["look here ", None, " and say what it is"], [(2, 5)], 11),
    Row(["nothing to see in this one"], [], 12),
    Row(["a longer beginning of it ", None, " which?"], [(4, 2)], 13),
]


def hide(inputs: dict, *holes: tuple[int, int, int]) -> dict:
    """The inputs with (row, first, last) tokens of their rows hidden, counted from each row's first token."""
    mask = inputs["attention_mask"].clone()
    for row, first, last in holes:
        start = int(inputs["attention_mask"][row].argmax())
        mask[row, start + first : start + last] = 0
    return {**inputs, "attention_mask": mask}


def image_start(inputs: dict, family: str, row: int = 0) -> int:
    """Place of a row's first image token, counted from its first token."""
    images = inputs["input_ids"][row] == shared_model(family).config.image_token_id
    return int(images.int().argmax()) - int(inputs["attention_mask"][row].argmax())


def run(family: str, inputs: dict, **options):
    settings = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_zoom_reports": True}
    return shared_model(family).generate(**inputs, **{**settings, **options})


def assert_rows_alone(family: str, holes: list[list[tuple[int, int]]], **options) -> list:
    """Compares ROWS in one batch with each alone; returns the reports."""
    inputs = make_inputs(family, ROWS)
    batch = run(family, hide(inputs, *((row, *hole) for row, part in enumerate(holes) for hole in part)), **options)
    for row, part in enumerate(holes):
        single = hide(make_inputs(family, [ROWS[row]]), *((0, *hole) for hole in part))
        alone = run(family, single, **options)
        assert batch.zoom_reports[row].box == alone.zoom_reports[0].box
        assert batch.sequences[row, -NEW_TOKENS:].equal(alone.sequences[0, -NEW_TOKENS:]), row
        if "num_beams" not in options:
            for ours, theirs in zip(batch.logits, alone.logits):
                assert float((ours[row] - theirs[0]).abs().max()) < 1e-4, row
    return batch.zoom_reports


def between(family: str) -> float:
    """A gate threshold that opens for one of the rows with an image only."""
    probabilities = [
        run(family, make_inputs(family, [row]), gate_threshold=0).zoom_reports[0].gate_probability for row in ROWS
    ]
    return (probabilities[0] + probabilities[2]) / 2


@families
@pytest.mark.parametrize("beams", [{}, {"num_beams": 2}])
def test_a_batch_with_hidden_tokens_equals_its_rows(family, beams):
    """A row zooms, a row has no image, a row skips; each hides tokens before and behind its image."""
    ends = [len(row.pieces[-1]) for row in ROWS]
    lengths = [int(make_inputs(family, [row])["attention_mask"].sum()) for row in ROWS]
    tails = [(length - end + 1, length - end + 3) for length, end in zip(lengths, ends)]
    holes = [[(1, 3), tails[0]], [(4, 9)], [(2, 7), tails[2]]]
    options = always(zoom="auto", gate_threshold=between(family), **beams)
    reports = assert_rows_alone(family, holes, **options)
    assert sorted(report.reason for report in reports) == ["gate_closed", "gate_open", "no_image"]
    assert all(report.zoomed for report in assert_rows_alone(family, holes, **always(**beams))[::2])


@families
def test_hidden_tokens_of_a_row_that_skips_equal_the_plain_model(family):
    masked = hide(make_inputs(family, ROWS), (0, 2, 5), (1, 0, 3), (2, 1, 2))
    reports = run(family, masked, gate_threshold=0).zoom_reports
    threshold = (reports[0].gate_probability + reports[2].gate_probability) / 2
    output = run(family, masked, **always(zoom="auto", gate_threshold=threshold))
    assert sum(report.zoomed for report in output.zoom_reports) == 1
    plain = shared_model(family).vlm.generate(
        **plain_inputs(masked), max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True
    )
    for row, report in enumerate(output.zoom_reports):
        if not report.zoomed:
            assert output.sequences[row].equal(plain.sequences[row])
            assert all(float((a[row] - b[row]).abs().max()) < 1e-4 for a, b in zip(output.logits, plain.logits))


PLACES = [(family, place) for family in FAMILIES for place in ("before", "behind", "both")]
PLACES += [(family, f"{side} marker") for family in FAMILIES if FAMILY[family].has_budget for side in ("start", "end")]


@pytest.mark.parametrize(("family", "place"), PLACES)
def test_a_zoomed_row_equals_the_plain_model_on_the_fused_prompt(family, place, monkeypatch):
    """The plain model sees coarse view and crop as two images, under the same mask."""
    model, spy = shared_model(family), CropSpy(monkeypatch)
    inputs = make_inputs(family, ROWS[:1])
    start, length = image_start(inputs, family), inputs["input_ids"].shape[1]
    end = start + int((inputs["input_ids"] == model.config.image_token_id).sum())
    holes = {
        "before": [(0, 2, 4)],
        "behind": [(0, end + 3, end + 6)],
        "both": [(0, 0, 3), (0, end + 2, end + 3), (0, length - 4, length - 1)],
        "start marker": [(0, start - 1, start)],
        "end marker": [(0, end, end + 1)],
    }[place]
    masked = hide(inputs, *holes)
    output = run(family, masked, **always(position_alignment="sequential"))
    report = output.zoom_reports[0]
    assert report.zoomed
    crop = spy.crops[inputs["source_images"][0].data_ptr()]
    fused, crop_place = fused_prompt(family, plain_inputs(inputs), report, crop)
    inserted = fused["input_ids"].shape[1] - length
    split = end if not FAMILY[family].has_budget else end + 1
    mask = masked["attention_mask"]
    mask = torch.cat([mask[:, :split], mask.new_ones(1, inserted), mask[:, split:]], dim=1)
    expected = model.vlm.generate(
        **fused,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert crop_place.start >= split
    assert output.sequences[0, -NEW_TOKENS:].equal(expected.sequences[0, -NEW_TOKENS:])
    for ours, theirs in zip(output.logits, expected.logits):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.max() - theirs.min())


def test_where_positions_are_plain_parts_of_an_image_may_be_hidden():
    start = image_start(make_inputs("llava", ROWS[:1]), "llava")
    late = image_start(make_inputs("llava", ROWS), "llava", row=2)
    holes = [[(start + 2, start + 5)], [], [(late, late + 1), (late + 15, late + 16)]]
    reports = assert_rows_alone("llava", holes, **always())
    assert [report.zoomed for report in reports] == [True, False, True]


@mrope_families
@pytest.mark.parametrize("count", [1, 10])
def test_hidden_image_tokens_are_refused_where_positions_need_the_whole_image(family, count):
    """The plain models of these families cannot place such images either."""
    inputs = make_inputs(family, ROWS[:1])
    start = image_start(inputs, family)
    with pytest.raises(ValueError, match=f"row 0, image 0: the attention mask hides {count} of its 10 tokens"):
        run(family, hide(inputs, (0, start, start + count)), **always())


def test_a_wholly_hidden_image_is_refused():
    inputs = make_inputs("llava", ROWS)
    start = image_start(inputs, "llava", row=2)
    with pytest.raises(ValueError, match="row 2, image 0: the attention mask hides 16 of its 16 tokens"):
        run("llava", hide(inputs, (2, start, start + 16)), **always())


@mrope_families
def test_images_that_a_mask_joins_are_refused(family):
    inputs = make_inputs(family, [Row(["see ", None, None, " two"], [(2, 2), (3, 2)], 4)])
    start = image_start(inputs, family)
    with pytest.raises(ValueError, match="no visible token stands between images 0 and 1"):
        run(family, hide(inputs, (0, start + 4, start + 6)), **always())


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_rows_keep_their_hidden_tokens(family, side):
    """A batch of a plain row and a zoomed one: the plain row's part of the loss is the plain model's."""
    model = shared_model(family)
    row = Row(["what is ", None, " here, in words?"], [(3, 3)], 21)
    single = hide(make_inputs(family, [row]), (0, 2, 5))
    length = single["input_ids"].shape[1]
    single["attention_mask"][0, length - 7 : length - 5] = 0
    labels = single["input_ids"].masked_fill(torch.arange(length) < length - 5, -100)
    visible = single["attention_mask"]  # as in `generate`, hidden tokens take no position
    positions = {} if "mm_token_type_ids" in single else {"position_ids": (visible.cumsum(-1) - 1) * visible}
    expected = model(**plain_inputs(single), **positions, labels=labels).loss

    both = make_inputs(family, [row, Row(["a much longer prompt than the other ", None, "?"], [(2, 2)], 22)])
    mask = both["attention_mask"].clone()
    pads = mask.shape[1] - length
    mask[0, pads:] = single["attention_mask"][0]
    all_labels = torch.full_like(mask, -100)
    all_labels[0, pads:] = labels[0]
    both["attention_mask"] = mask
    if side == "right":
        types = {"mm_token_type_ids": both["mm_token_type_ids"]} if "mm_token_type_ids" in both else {}
        for tensor in (both["input_ids"], mask, all_labels, *types.values()):
            tensor[0] = tensor[0].roll(-pads)
    source = both["source_images"][1]
    box = (0, 0, source.shape[2] // 2, source.shape[1] // 2)
    loss = model(**both, labels=all_labels, zoom_boxes=[None, box]).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
