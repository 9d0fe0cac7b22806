"""`forward` with `labels` over the fused sequence equals what `generate` computes step by step."""

import pytest
import torch
import torch.nn.functional as F

from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


# seeds that are multiples of 7 give sources of whole pixels per cell, so that boxes in pixels are boxes of cells
ROWS = [
    Row(["see ", None, " what?"], [(3, 4)], seed=7),
    Row([None, "two images", None, "and a longer question"], [(2, 3), (4, 2)], seed=35),
    Row(["no image in this one"]),
    Row(["text before a strip ", None], [(1, 5)], seed=21),
]
ANSWER = 4
IGNORED = -100
REGION = {"region_threshold": 0.6, "region_threshold_mode": "peak"}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def generate(model, inputs: dict, **options):
    arguments = {"zoom": "always", "max_new_tokens": ANSWER, "output_logits": True, "return_zoom_reports": True}
    return model.generate(**inputs, **{**arguments, **options})


def with_answers(inputs: dict, sequences: torch.Tensor, right: bool = False) -> dict:
    """Training inputs: prompts and their answers, labelled on the answers; `right` moves the padding to the right."""
    prompt = inputs["input_ids"].shape[1]
    batch = {**inputs, "input_ids": sequences}
    batch["attention_mask"] = F.pad(inputs["attention_mask"], (0, ANSWER), value=1)
    if "mm_token_type_ids" in inputs:
        batch["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, ANSWER))
    batch["labels"] = sequences.clone()
    batch["labels"][:, :prompt] = IGNORED
    if right:
        lengths = batch["attention_mask"].sum(1).tolist()
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
            if name in batch:
                batch[name] = torch.stack([row.roll(length, 0) for row, length in zip(batch[name], lengths)])
    return batch


def answer_logits(output) -> torch.Tensor:
    """(B, ANSWER, vocabulary) logits that predict the answers; fused rows are left-padded."""
    return output.logits[:, -ANSWER - 1 : -1]


def step_logits(output) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def boxes_of(reports) -> list:
    return [(report.image_index, report.box) if report.zoomed else None for report in reports]


def language_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("keep_share", [1.0, 0.2])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
def test_given_boxes_equal_what_generate_did(family, right, keep_share):
    model, inputs = tiny_model(family, keep_share=keep_share, **REGION), make_inputs(family, ROWS)
    generated = generate(model, inputs)
    boxes = boxes_of(generated.zoom_reports)
    assert [box is not None for box in boxes] == [True, True, False, True]
    output = model(**with_answers(inputs, generated.sequences, right), zoom_boxes=boxes)
    torch.testing.assert_close(answer_logits(output), step_logits(generated), atol=1e-4, rtol=0)
    expected = language_loss(step_logits(generated), generated.sequences[:, -ANSWER:])
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep_share", [1.0, 0.2])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
def test_without_boxes_the_region_branch_proposes_them(family, right, keep_share):
    rows = [Row(row.pieces, row.grids, seed=row.seed + 2) for row in ROWS]
    model, inputs = tiny_model(family, keep_share=keep_share, **REGION), make_inputs(family, rows)
    generated = generate(model, inputs)
    assert sum(report.zoomed for report in generated.zoom_reports) >= 2
    output = model(**with_answers(inputs, generated.sequences, right))
    torch.testing.assert_close(answer_logits(output), step_logits(generated), atol=1e-4, rtol=0)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in model.zoom.parameters())


@pytest.mark.parametrize("alignment", ["continuous", "sequential"])
def test_the_configured_alignment_is_used(alignment):
    model = tiny_model("qwen3_vl", position_alignment=alignment, **REGION)
    inputs = make_inputs("qwen3_vl", ROWS[:1])
    results = []
    for positions in ("continuous", "sequential"):
        generated = generate(model, inputs, position_alignment=positions)
        output = model(**with_answers(inputs, generated.sequences), zoom_boxes=boxes_of(generated.zoom_reports))
        results.append((answer_logits(output) - step_logits(generated)).abs().max() < 1e-4)
    assert results == [alignment == "continuous", alignment == "sequential"]


def test_rows_without_a_box_are_plain(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    sequences = F.pad(inputs["input_ids"], (0, ANSWER), value=70)
    batch = with_answers(inputs, sequences)
    plain = model(**plain_inputs(batch))
    output = model(**batch, zoom_boxes=[None] * 4)
    torch.testing.assert_close(output.loss, plain.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(answer_logits(output), plain.logits[:, -ANSWER - 1 : -1], atol=1e-4, rtol=0)
    zoomed = model(**batch, zoom_boxes=[(0, 0, 60, 60), None, None, (0, 0, 50, 50)])
    difference = (answer_logits(zoomed) - answer_logits(output)).abs().amax((1, 2))
    assert difference[0] > 0.02 and difference[3] > 0.02
    assert difference[1] < 1e-4 and difference[2] < 1e-4


def test_text_only_batches_need_no_sources(family):
    model, inputs = tiny_model(family), make_inputs(family, [ROWS[2], Row(["another text, a longer one"])])
    batch = with_answers(inputs, F.pad(inputs["input_ids"], (0, ANSWER), value=70))
    plain = model(**batch)
    torch.testing.assert_close(model(**batch, zoom_boxes=[None, None]).loss, plain.loss, atol=1e-5, rtol=0)


def test_boxes_may_be_tensors_or_name_their_image(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS[:2])
    batch = with_answers(inputs, F.pad(inputs["input_ids"], (0, ANSWER), value=70))
    box = (3, 4, 70, 60)
    losses = [
        model(**batch, zoom_boxes=boxes).loss
        for boxes in ([box, box], [torch.tensor(box), list(box)], [(0, box), (0, torch.tensor(box))])
    ]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], model(**batch, zoom_boxes=[box, (1, box)]).loss)


def test_inserted_positions_have_no_labels(family):
    """With every prompt token labelled, the loss is the mean over the row's own tokens, crop left out."""
    model, inputs = tiny_model(family), make_inputs(family, ROWS[:1])
    plain, ids = plain_inputs(inputs), inputs["input_ids"][0]
    box = (0, 0, 110, 120)
    output = model(**inputs, labels=inputs["input_ids"], zoom_boxes=[box])
    image = model.config.image_token_id
    markers = FAMILY[family].markers
    end = int((ids == image).nonzero()[-1, 0]) + 1 + markers // 2
    inserted = output.logits.shape[1] - len(ids)
    assert inserted > markers
    labels = torch.cat([ids[:end], torch.full((inserted,), IGNORED), ids[end:]])
    expected = F.cross_entropy(output.logits[0, :-1], labels[1:], ignore_index=IGNORED)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    before = model(**plain).logits[0, :end]
    torch.testing.assert_close(output.logits[0, :end], before, atol=1e-4, rtol=0)
    count = int((labels[1:] != IGNORED).sum())
    assert count == len(ids) - 1
    halved = model(**inputs, labels=inputs["input_ids"], zoom_boxes=[box], num_items_in_batch=2 * count).loss
    torch.testing.assert_close(halved, output.loss / 2, atol=1e-5, rtol=0)


def test_gradients_reach_the_whole_backbone_and_no_branch(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    batch = with_answers(inputs, F.pad(inputs["input_ids"], (0, ANSWER), value=70))
    model(**batch, zoom_boxes=[(0, 0, 60, 60), None, None, (0, 0, 50, 50)]).loss.backward()
    reached = {name for name, part in model.named_parameters() if part.grad is not None and bool(part.grad.any())}
    assert not any(name.startswith("zoom.") for name in reached)
    for index in range(len(model.vlm.get_decoder().layers)):
        assert any(f".language_model.layers.{index}.mlp" in name for name in reached)
    assert any("lm_head" in name for name in reached) and any("embed_tokens" in name for name in reached)
    assert any("visual" in name or "vision_tower" in name for name in reached)


def test_gradient_checkpointing_changes_nothing(family):
    model, inputs = tiny_model(family), make_inputs(family, ROWS)
    batch = with_answers(inputs, F.pad(inputs["input_ids"], (0, ANSWER), value=70))
    gradients = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            # its name up to some version before 6
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model(**batch, zoom_boxes=[(0, 0, 60, 60), None, None, (0, 0, 50, 50)]).loss.backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


ERRORS = {
    "rows": ({"zoom_boxes": [None]}, "zoom_boxes has 1 rows, the batch 2"),
    "image": ({"zoom_boxes": [(1, (0, 0, 9, 9)), None]}, "row 0 names image 1, it has 1 images"),
    "negative image": ({"zoom_boxes": [None, (-1, (0, 0, 9, 9))]}, "row 1 names image -1"),
    "outside": ({"zoom_boxes": [(0, 0, 9999, 9), None]}, "leaves its image"),
    "negative": ({"zoom_boxes": [(-5, 0, 9, 9), None]}, "leaves its image"),
    "empty": ({"zoom_boxes": [None, (9, 9, 9, 20)]}, "of row 1 is empty"),
    "sources": ({"source_images": None, "zoom_boxes": [None, None]}, "source_images is missing"),
    "count": ({"source_images": [torch.zeros(3, 9, 9, dtype=torch.uint8)]}, "the first one missing is row 1, image 0"),
    "targets": ({"region_targets": [None, None]}, "different training stages"),
    "gate": ({"gate_targets": torch.ones(2)}, "different training stages"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_cause(case):
    model, inputs = tiny_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", ROWS[:2])
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, "labels": inputs["input_ids"], **call})
