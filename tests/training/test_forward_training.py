"""`forward` with branch targets: losses, gradients and the ways to ask."""

import pytest
import torch
import torch.nn.functional as F

from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


ROWS = [
    Row(["see ", None, " what?"], [(3, 4)], seed=1),
    Row([None, "two images", None, "and a longer question"], [(2, 3), (4, 2)], seed=2),
    Row(["no image in this one"]),
    Row(["text before a strip ", None], [(1, 5)], seed=3),
]
IGNORED = -100


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def grids(family: str, row: Row) -> list[tuple[int, int]]:
    return FAMILY[family].grids(*row.grids)


def draw_targets(family: str, rows: list[Row], queries: int = 1, seed: int = 0) -> list[list[torch.Tensor] | None]:
    """Per row and image a (queries, h, w) map in {1, 0, -100}; None for a row without images."""
    generator = torch.Generator().manual_seed(seed)
    targets: list[list[torch.Tensor] | None] = []
    for row in rows:
        maps = [
            torch.randint(0, 3, (queries, *grid), generator=generator).float().sub(1) for grid in grids(family, row)
        ]
        targets.append([part.masked_fill(part < 0, IGNORED) for part in maps] or None)
    return targets


def expected_region_loss(logits: list[list[torch.Tensor]], targets: list) -> torch.Tensor:
    """The mean over labelled cells, cell by cell."""
    terms = []
    for row_logits, row_targets in zip(logits, targets):
        for scores, labels in zip(row_logits, row_targets or []):
            keep = labels != IGNORED
            terms.append(F.binary_cross_entropy_with_logits(scores, labels, reduction="none")[keep])
    return torch.cat(terms).mean()


def right_padded(inputs: dict) -> dict:
    """The same rows with their padding on the other side."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    moved = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            rows = [row.roll(length, 0) for row, length in zip(inputs[name], lengths)]
            moved[name] = torch.stack(rows)
    assert bool((moved["attention_mask"][:, 0] == 1).all())
    return moved


def last_columns(inputs: dict) -> torch.Tensor:
    return torch.full((len(inputs["input_ids"]), 1), inputs["input_ids"].shape[1] - 1)


@pytest.fixture(params=["full", "light"])
def branches(request) -> dict[str, str]:
    """Both branches with every token updated, or with text alone."""
    return {"gate_branch": request.param, "region_branch": request.param}


def test_losses_and_logits(family, branches):
    """Losses follow from the logits; the logits are those that generate decides by."""
    model, inputs = tiny_model(family, **branches), make_inputs(family, ROWS)
    targets, gate_targets = draw_targets(family, ROWS), torch.tensor([1.0, 0.0, IGNORED, 1.0])
    output = model(**plain_inputs(inputs), region_targets=targets, gate_targets=gate_targets)
    torch.testing.assert_close(output.region_loss, expected_region_loss(output.region_logits, targets))
    kept = gate_targets != IGNORED
    gate_loss = F.binary_cross_entropy_with_logits(output.gate_logits[kept], gate_targets[kept])
    torch.testing.assert_close(output.gate_loss, gate_loss)
    torch.testing.assert_close(output.loss, output.region_loss + output.gate_loss)
    assert output.logits is None and output.region_logits[2] == []
    reports = model.generate(
        **inputs, zoom="auto", gate_threshold=0, return_zoom_reports=True, max_new_tokens=1
    ).zoom_reports
    for row, report in enumerate(reports):
        if report.reason == "no_image":
            continue
        assert abs(output.gate_logits[row].sigmoid() - report.gate_probability) < 1e-5
        logits = output.region_logits[row][report.image_index][0]
        torch.testing.assert_close(logits, report.region_logits, atol=1e-4, rtol=0)


def test_one_target_kind_computes_one_branch(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS))
    both = model(**inputs, region_targets=draw_targets(family, ROWS), gate_targets=torch.ones(4))
    region = model(**inputs, region_targets=draw_targets(family, ROWS))
    gate = model(**inputs, gate_targets=torch.ones(4))
    assert region.gate_loss is None and region.gate_logits is None and torch.equal(region.loss, both.region_loss)
    assert gate.region_loss is None and gate.region_logits is None and torch.equal(gate.loss, both.gate_loss)


def test_ways_to_write_the_targets(family):
    """(h, w), (1, h, w), a list of one and a stacked batch mean the same."""
    rows = [Row(["a", None], [(3, 4)], seed=1), Row([None, "a longer one"], [(3, 4)], seed=2)]
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, rows))
    listed = draw_targets(family, rows)
    flat = [row[0] for row in listed]
    ways = [listed, flat, [part[0] for part in flat], torch.stack(flat)]
    losses = [model(**inputs, region_targets=way).loss for way in ways]
    assert all(torch.equal(losses[0], loss) for loss in losses[1:])


def test_targets_of_another_grid_meet_resized_logits(family):
    rows = ROWS[:1]
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, rows))
    targets = torch.randint(0, 2, (1, 7, 9)).float()
    output = model(**inputs, region_targets=[targets])
    logits = output.region_logits[0][0]
    assert tuple(logits.shape[1:]) == grids(family, rows[0])[0]
    resized = F.interpolate(logits[None], (7, 9), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(resized, targets))


def test_rows_without_targets_do_not_count(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS))
    targets = draw_targets(family, ROWS)
    fewer = [targets[0], None, None, targets[3]]
    output = model(**inputs, region_targets=fewer)
    torch.testing.assert_close(output.loss, expected_region_loss(output.region_logits, fewer))
    assert output.region_logits[1] == []
    ignored = [targets[0], [torch.full_like(part, IGNORED) for part in targets[1]], None, targets[3]]
    torch.testing.assert_close(model(**inputs, region_targets=ignored).loss, output.loss)


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_labelled_is_a_zero_loss_with_a_finite_gradient(family, frozen):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS))
    model.vlm.requires_grad_(not frozen)
    blank = [row and [torch.full_like(part, IGNORED) for part in row] for row in draw_targets(family, ROWS)]
    nothing = torch.full((4,), IGNORED)
    calls = [
        {"region_targets": blank},
        {"region_targets": [None] * 4},
        {"gate_targets": nothing},
        {"region_targets": blank, "gate_targets": nothing},
    ]
    for call in calls:
        model.zero_grad()
        loss = model(**inputs, **call).loss
        assert loss.item() == 0.0
        loss.backward()
        gradients = [parameter.grad for parameter in model.zoom.parameters() if parameter.grad is not None]
        assert gradients and all(bool((gradient == 0).all()) for gradient in gradients)


def test_padding_side_does_not_matter(family, branches):
    model, inputs = tiny_model(family, **branches), plain_inputs(make_inputs(family, ROWS))
    targets, gate_targets = draw_targets(family, ROWS), torch.tensor([1.0, 0.0, 1.0, 0.0])
    left = model(**inputs, region_targets=targets, gate_targets=gate_targets)
    moved = right_padded(inputs)
    right = model(**moved, region_targets=targets, gate_targets=gate_targets)
    ends = moved["attention_mask"].sum(1, keepdim=True) - 1
    explicit = model(**moved, region_targets=targets, gate_targets=gate_targets, query_positions=ends)
    for other in (right, explicit):
        torch.testing.assert_close(other.gate_logits, left.gate_logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.loss, left.loss, atol=1e-5, rtol=0)
        for row, images in enumerate(left.region_logits):
            for image, logits in enumerate(images):
                torch.testing.assert_close(other.region_logits[row][image], logits, atol=1e-5, rtol=0)


def test_a_batch_is_the_mean_of_its_rows(family, branches):
    model, inputs = tiny_model(family, **branches), plain_inputs(make_inputs(family, ROWS))
    targets, gate_targets = draw_targets(family, ROWS), torch.tensor([1.0, 0.0, IGNORED, 1.0])
    batch = model(**inputs, region_targets=targets, gate_targets=gate_targets)
    region, cells, gate, asked = 0.0, 0, 0.0, 0
    for row, row_targets in enumerate(targets):
        single = plain_inputs(make_inputs(family, ROWS[row : row + 1]))
        labelled = int(gate_targets[row] != IGNORED)
        gate += labelled * model(**single, gate_targets=gate_targets[row : row + 1]).loss.item()
        asked += labelled
        if row_targets is None:
            continue
        count = sum(int((part != IGNORED).sum()) for part in row_targets)
        region += count * model(**single, region_targets=[row_targets]).loss.item()
        cells += count
    assert abs(batch.region_loss.item() - region / cells) < 1e-5
    assert abs(batch.gate_loss.item() - gate / asked) < 1e-5


def test_several_questions_in_one_sequence(family, branches):
    """Each query scores every image as if the sequence ended with it; -1 leaves a query out."""
    rows = [ROWS[1], ROWS[0]]
    model, inputs = tiny_model(family, **branches), plain_inputs(make_inputs(family, rows))
    end = inputs["input_ids"].shape[1] - 1
    positions = torch.tensor([[end, end - 3, end - 6], [end - 2, end, -1]])
    targets = draw_targets(family, rows, queries=3)
    output = model(**inputs, region_targets=targets, query_positions=positions)
    for row, columns in enumerate(positions.tolist()):
        single = plain_inputs(make_inputs(family, rows[row : row + 1]))
        length = single["input_ids"].shape[1]
        for query, column in enumerate(columns):
            if column < 0:
                continue
            cut = length - (end - column)
            names = ("input_ids", "attention_mask", "mm_token_type_ids")
            shorter = {**single, **{name: single[name][:, :cut] for name in names if name in single}}
            alone = model(**shorter, region_targets=[[part[query] for part in targets[row]]])
            for image, logits in enumerate(alone.region_logits[0]):
                torch.testing.assert_close(output.region_logits[row][image][query], logits[0], atol=1e-4, rtol=0)
    first, second = output.region_logits[0][0][0], output.region_logits[0][0][1]
    assert (first - second).abs().max() > 0.01
    counted = [targets[0], [part[:2] for part in targets[1]]]
    scored = [output.region_logits[0], [part[:2] for part in output.region_logits[1]]]
    torch.testing.assert_close(output.loss, expected_region_loss(scored, counted))


def test_the_gate_reads_the_first_query(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, ROWS[:2]))
    end = inputs["input_ids"].shape[1] - 1
    targets = torch.tensor([1.0, 0.0])
    first = model(**inputs, gate_targets=targets, query_positions=torch.tensor([[end - 2, end], [end - 2, end]]))
    only = model(**inputs, gate_targets=targets, query_positions=torch.tensor([[end - 2], [end - 2]]))
    last = model(**inputs, gate_targets=targets)
    assert torch.equal(first.gate_logits, only.gate_logits)
    assert (first.gate_logits - last.gate_logits).abs().max() > 1e-3
    absent = model(**inputs, gate_targets=targets, query_positions=torch.tensor([[end, -1], [-1, -1]]))
    torch.testing.assert_close(absent.loss, F.softplus(-last.gate_logits[0]))


def reached(model) -> set[str]:
    """Names of parameters with a gradient that is not zero everywhere."""
    return {name for name, part in model.named_parameters() if part.grad is not None and bool((part.grad != 0).any())}


def test_gradients_reach_the_branch_that_is_trained(family, branches):
    """With a frozen backbone exactly the branch, all of it; otherwise also everything below the tap."""
    model, inputs = tiny_model(family, **branches), plain_inputs(make_inputs(family, ROWS))
    names = {name for name, _ in model.named_parameters()}
    kinds = {
        "zoom.region.": {"region_targets": draw_targets(family, ROWS)},
        "zoom.gate.": {"gate_targets": torch.tensor([1.0, 0.0, 0.0, 1.0])},
    }
    layers = len(model.vlm.get_decoder().layers)
    above = tuple(f".language_model.layers.{index}." for index in range(model.config.branch_layer, layers))
    for prefix, call in kinds.items():
        branch = {name for name in names if name.startswith(prefix)}
        # attention's softmax cancels the bias of its keys
        shifts = {name for name in branch if name.endswith("self_attn.k_proj.bias")}
        for frozen in (True, False):
            model.zero_grad()
            model.vlm.requires_grad_(not frozen)
            model(**inputs, **call).loss.backward()
            found = reached(model)
            assert {name for name in found if name.startswith("zoom.")} | shifts == branch
            below = {name for name in found if name.startswith("vlm.")}
            assert bool(below) != frozen
            assert not any(part in name for name in below for part in (*above, "lm_head", "language_model.norm"))
            if not frozen:
                for index in range(model.config.branch_layer):
                    assert any(f".language_model.layers.{index}.mlp" in name for name in below)
                assert any("embed_tokens" in name for name in below)
                assert any("visual" in name or "vision_tower" in name for name in below)


def test_gradient_checkpointing_changes_nothing(family, branches):
    model, inputs = tiny_model(family, **branches), plain_inputs(make_inputs(family, ROWS))
    call = {"region_targets": draw_targets(family, ROWS), "gate_targets": torch.ones(4)}
    gradients = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            # its name up to some version before 6
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            assert model.zoom.gate.layers[0].gradient_checkpointing
        model(**inputs, **call).loss.backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


ERRORS = {
    "labels": ({"labels": torch.zeros(2, 3).long()}, "different training stages"),
    "rows": ({"region_targets": [None]}, "has 1 rows, the batch 2"),
    "maps": ({"region_targets": [None, [torch.ones(1, 2, 2)] * 3]}, "row 1 has 3 maps and 2 images"),
    "queries": ({"region_targets": [torch.ones(2, 3, 3), None]}, "2 maps for an image that 1 queries"),
    "gate": ({"gate_targets": torch.ones(2, 1)}, "one number per row"),
    "positions": ({"query_positions": torch.tensor([[0], [999]])}, "query_positions must be"),
    "shape": ({"query_positions": torch.tensor([3, 4])}, "query_positions must be"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_cause(case):
    model, inputs = tiny_model("qwen2_5_vl"), plain_inputs(make_inputs("qwen2_5_vl", ROWS[:2]))
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        model(**inputs, **{"gate_targets": torch.ones(2), **call})


def test_targets_without_an_image_or_a_gate():
    model, inputs = tiny_model("llava"), plain_inputs(make_inputs("llava", ROWS))
    with pytest.raises(ValueError, match=r"rows \[2\] have targets but no image"):
        model(**inputs, region_targets=[None, None, torch.ones(1, 4, 4), None])
    model.zoom.gate = None
    with pytest.raises(ValueError, match="has no gate"):
        model(**inputs, gate_targets=torch.ones(4))


def test_training_passes_take_no_unknown_arguments_and_no_odd_targets():
    model = tiny_model("qwen2_5_vl")
    inputs = plain_inputs(make_inputs("qwen2_5_vl", [Row(["what is ", None, "?"], [(4, 4)])]))
    with pytest.raises(ValueError, match="query_postions.*misspelt"):
        model(**inputs, gate_targets=torch.ones(1), query_postions=torch.zeros(1, 1))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(gate_targets=torch.ones(1), inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(gate_targets=torch.ones(1))
    for odd in (3.0, float("nan"), 0.5):
        with pytest.raises(ValueError, match="must be 1, 0 or -100"):
            model(**inputs, gate_targets=[odd])
    with pytest.raises(ValueError, match="must be 1, 0 or -100"):
        model(**inputs, region_targets=[torch.full((1, 4, 4), 0.5)])
    assert model(**inputs, gate_targets=[1], num_items_in_batch=1).gate_loss > 0
