"""A page changes what runs, not what comes out: rows that begin alike, and calls that continue from `read_page`."""

import random
from collections import Counter

import pytest
import torch

import modeling_qzoom.zoom_page_reading_qzoom as reading
from tests.invariants.test_batches import NEW_TOKENS, Spy, assert_same_row, choose_options, has_tie, run
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


# (family, branch_layer, branch_depth, batches)
VARIANTS = [
    *((family, 3, 2, 16) for family in FAMILIES),
    ("qwen3_vl", 1, 3, 16),  # the branches tap in the middle of the DeepStack layers
    ("llava", 2, 1, 16),  # the region branch is its scorer alone
]
ZOOM = {"region_threshold": 0.7, "region_threshold_mode": "peak"}
GRIDS = [(2, 3), (4, 4), (3, 6), (6, 2)]
families = pytest.mark.parametrize("family", FAMILIES)


class Reads:
    """Counts the beginnings that calls read for their own rows."""

    def __init__(self, monkeypatch):
        self.count = 0
        original = reading.read_pages

        def record(model, beginnings):
            self.count += len(beginnings)
            return original(model, beginnings)

        monkeypatch.setattr(reading, "read_pages", record)


def random_rows(rng: random.Random) -> list[Row]:
    """Two documents with one or two images each, and questions about them; now and then another image or none."""
    documents = []
    for _ in range(2):
        before, grids = "d" * rng.randrange(8), [rng.choice(GRIDS) for _ in range(rng.choice([1, 2]))]
        documents.append(([before, *[None] * len(grids)], grids, rng.randrange(10**6)))
    rows = []
    for _ in range(rng.randrange(2, 6)):
        pieces, grids, seed = rng.choice(documents)
        question = "?" + "q" * rng.randrange(12) + str(rng.randrange(100))
        if rng.random() < 0.3:  # a second image of its own, whose content follows from its place in the list
            pieces, grids = [*pieces, *[""] * rng.randrange(1, 4), None], [*grids, rng.choice(GRIDS)]
        rows.append(Row([*pieces, question], grids, seed))
    if rng.random() < 0.3:
        rows.insert(rng.randrange(len(rows) + 1), Row(["no image " + "x" * rng.randrange(30)]))
    return rows


def draw(family: str, model, spy: Spy, rng: random.Random) -> tuple[list[Row], dict, list]:
    """Rows, options under which rounding decides nothing, and every row's answer by itself."""
    while True:
        rows = random_rows(rng)
        if not any(row.grids for row in rows):
            continue
        options = choose_options(family, model, make_inputs(family, rows), spy, rng)
        singles, tied = [], False
        for row in rows:
            singles.append(run(model, make_inputs(family, [row]), **options))
            tied |= has_tie(spy.take(), singles[-1].zoom_reports[0], options)
        if not tied:
            return rows, options, singles


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant[0]}-{variant[1]}")
def test_rows_that_begin_alike_equal_their_own_runs(variant, monkeypatch):
    family, branch_layer, branch_depth, batches = variant
    model = tiny_model(family, branch_layer=branch_layer, branch_depth=branch_depth)
    spy, reads, seen = Spy(monkeypatch), Reads(monkeypatch), Counter()
    for number in range(batches):
        rows, options, singles = draw(family, model, spy, random.Random(f"pages {family} {branch_layer} {number}"))
        before = reads.count
        batch = run(model, make_inputs(family, rows), **options)
        seen["shared"] += reads.count > before
        pages = [model.read_page(**make_inputs(family, [row])) if row.grids else None for row in rows]
        continued = run(model, make_inputs(family, rows), page=pages, **options)
        for row, alone in enumerate(singles):
            assert_same_row(batch, row, alone)
            assert_same_row(continued, row, alone)
            seen[alone.zoom_reports[0].reason] += 1
        zoomed = {report.zoomed for report in batch.zoom_reports}
        seen["mixed"] += len(zoomed) == 2
        seen["other image"] += sum(bool(report.image_index) for report in batch.zoom_reports)
    assert seen["shared"] >= batches // 3 and seen["mixed"] >= 2, seen
    assert all(seen[reason] >= 2 for reason in ("gate_open", "gate_closed", "forced", "other image")), seen


QUESTIONS = ["what is it?", "and that, over there?", "hm?"]


def page_rows(count: int = 3) -> list[Row]:
    return [Row(["see ", None, question], [(3, 4)], seed=1) for question in QUESTIONS[:count]]


@families
@pytest.mark.parametrize(
    "decoding",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_beams_and_samples_continue_from_a_page(family, decoding):
    model = tiny_model(family)
    page = model.read_page(**make_inputs(family, page_rows(1)))
    options = {"zoom": "auto", "gate_threshold": 0, **ZOOM, "max_new_tokens": NEW_TOKENS, **decoding}
    for rows in (page_rows(1), page_rows()):
        inputs = make_inputs(family, rows)
        torch.manual_seed(0)
        shared = model.generate(**inputs, **options)
        torch.manual_seed(0)
        alone = model.generate(**inputs, **options, skip_unread=False)
        torch.manual_seed(0)
        continued = model.generate(**inputs, **options, page=page)
        assert torch.equal(shared, alone) and torch.equal(continued, alone)


@families
def test_a_page_is_not_changed_by_the_calls_that_use_it(family):
    model = tiny_model(family)
    page, again = (model.read_page(**make_inputs(family, page_rows(1))) for _ in range(2))
    before = [tensor.clone() for tensor in reading_tensors(page)]
    for options in ({"zoom": "always"}, {"zoom": "always", "keep_share": 0.2}, {"zoom": "auto", "gate_threshold": 2}):
        run(model, make_inputs(family, page_rows()), page=page, **ZOOM, **options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(reading_tensors(page), before, strict=True))
    assert page.nbytes == again.nbytes == sum(tensor.nbytes for tensor in before)


def reading_tensors(page) -> list[torch.Tensor]:
    from modeling_qzoom.zoom_pages_qzoom import _tensors

    return _tensors(page)


@families
def test_branches_of_another_kind_read_the_page_themselves(family):
    model, inputs = tiny_model(family), make_inputs(family, page_rows(1))
    for read, asked in (("full", "light"), ("light", "full")):
        page = model.read_page(**inputs, gate_branch=read, region_branch=read)
        options = {"zoom": "auto", "gate_threshold": 0, **ZOOM, "gate_branch": asked, "region_branch": asked}
        assert_same_row(run(model, inputs, page=page, **options), 0, run(model, inputs, **options))


@families
def test_without_zoom_a_page_gives_what_the_plain_model_says(family):
    """Within rounding: attention over the page's keys and values sums in another order."""
    model, inputs = tiny_model(family), make_inputs(family, page_rows())
    page = model.read_page(**make_inputs(family, page_rows(1)))
    ours = run(model, plain_inputs(inputs), page=page, zoom="never")
    plain = model.vlm.generate(
        **plain_inputs(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(ours.sequences, plain.sequences)
    for mine, theirs in zip(ours.logits, plain.logits):
        assert (mine - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())
    assert [report.reason for report in ours.zoom_reports] == ["off"] * 3


@families
def test_a_prompt_that_ends_with_its_page(family):
    """Of which the last token runs again: its logits are the answer."""
    model = tiny_model(family)
    rows = [Row(["see ", None], [(3, 4)], seed=1), *page_rows(1)]
    page = model.read_page(**make_inputs(family, rows[:1]))
    for options in ({"zoom": "always"}, {"zoom": "auto", "gate_threshold": 2}):
        for kinds in ("full", "light"):
            settings = {**ZOOM, **options, "gate_branch": kinds, "region_branch": kinds}
            singles = [run(model, make_inputs(family, [row]), **settings) for row in rows]
            batch = run(model, make_inputs(family, rows), **settings)
            continued = run(model, make_inputs(family, rows), page=page, **settings)
            for row, alone in enumerate(singles):
                assert_same_row(batch, row, alone)
                assert_same_row(continued, row, alone)


@families
def test_a_row_may_hide_tokens_behind_its_page(family):
    model = tiny_model(family)
    inputs = make_inputs(family, page_rows(2))
    page = model.read_page(**make_inputs(family, page_rows(1)))
    inputs["attention_mask"][1, -4] = 0
    options = {"zoom": "auto", "gate_threshold": 0, **ZOOM}
    alone = run(model, inputs, skip_unread=False, **options)
    for shared in (run(model, inputs, **options), run(model, inputs, page=page, **options)):
        for row in range(2):
            single = type(alone)(sequences=alone.sequences[row : row + 1], logits=[l[row : row + 1] for l in alone.logits])
            single["zoom_reports"] = alone.zoom_reports[row : row + 1]
            assert_same_row(shared, row, single)


@families
def test_equal_pixels_on_another_grid_are_another_image(family, monkeypatch):
    model, reads = tiny_model(family), Reads(monkeypatch)
    rows = [Row(["see ", None, "a"], [(2, 6)], seed=1), Row(["see ", None, "b"], [(3, 4)], seed=1)]
    inputs = make_inputs(family, rows)
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    run(model, inputs, zoom="always", **ZOOM)
    assert reads.count == (0 if "image_grid_thw" in inputs else 1)


@families
def test_skip_unread_off_runs_every_row_by_itself(family, monkeypatch):
    model, reads = tiny_model(family), Reads(monkeypatch)
    run(model, make_inputs(family, page_rows()), zoom="always", **ZOOM, skip_unread=False)
    assert reads.count == 0


@families
def test_the_vision_tower_sees_a_shared_image_once(family):
    model = tiny_model(family)
    counts = []
    hook = model.vlm.base_model.vision_tower if hasattr(model.vlm.base_model, "vision_tower") else None
    tower = hook or model.vlm.base_model.visual
    handle = tower.register_forward_pre_hook(lambda module, args, kwargs: counts.append(_pixels(args, kwargs)), with_kwargs=True)
    single = make_inputs(family, page_rows(1))
    page = model.read_page(**single)
    own = counts.pop()
    for inputs, options, expected in (
        (make_inputs(family, page_rows()), {}, [own]),
        (make_inputs(family, page_rows()), {"page": page}, []),
        (make_inputs(family, [*page_rows(), Row(["see ", None, "?"], [(3, 4)], seed=2)]), {}, [2 * own]),
        (make_inputs(family, [*page_rows(1), Row(["see ", None, "?"], [(3, 4)], seed=2)]), {"page": [page, None]}, [own]),
    ):
        run(model, inputs, zoom="auto", gate_threshold=2, **options)
        assert counts == expected
        counts.clear()
    handle.remove()


def _pixels(args, kwargs) -> int:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return tensors[0].numel()
