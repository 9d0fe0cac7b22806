"""A page changes what runs, not what comes out: rows that begin alike, and calls that continue from `read_page`."""

import gc
import random
import threading
import weakref
from collections import Counter
from dataclasses import is_dataclass
from functools import wraps
from types import SimpleNamespace

import pytest
import torch

import modeling_qzoom.zoom_page_reading_qzoom as reading
from tests.invariants.test_batches import NEW_TOKENS, Spy, assert_same_row, choose_options, has_tie, run
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


# (family, branch_layer, branch_depth, batches)
VARIANTS = [
    *((family, 3, 2, 12) for family in FAMILIES),
    ("qwen3_vl", 1, 3, 12),  # the branches tap in the middle of the DeepStack layers
    ("llava", 2, 1, 12),  # the region branch is its scorer alone
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


def assert_within_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


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
            for output in (batch, continued):
                assert_within_rounding(output.logits[0][row], alone.logits[0][0])
            seen[alone.zoom_reports[0].reason] += 1
        zoomed = {report.zoomed for report in batch.zoom_reports}
        seen["mixed"] += len(zoomed) == 2
        seen["other image"] += sum(bool(report.image_index) for report in batch.zoom_reports)
    assert seen["shared"] >= batches // 3 and seen["mixed"] >= 2, seen
    assert all(seen[reason] >= 1 for reason in ("gate_open", "gate_closed", "forced", "other image")), seen


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
    before = [tensor.clone() for tensor in tensors_of(page)]
    for options in ({"zoom": "always"}, {"zoom": "always", "keep_share": 0.2}, {"zoom": "auto", "gate_threshold": 2}):
        run(model, make_inputs(family, page_rows()), page=page, **ZOOM, **options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors_of(page), before, strict=True))
    assert page.nbytes == again.nbytes == sum(tensor.nbytes for tensor in before)


def tensors_of(value) -> list[torch.Tensor]:
    """All tensors in dataclasses, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = vars(value).values() if is_dataclass(value) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def assert_same_rows(batch, other) -> None:
    """`assert_same_row` for all rows of two batches."""
    for row, report in enumerate(other.zoom_reports):
        logits = [step[row : row + 1] for step in other.logits]
        alone = SimpleNamespace(sequences=other.sequences[row : row + 1], logits=logits, zoom_reports=[report])
        assert_same_row(batch, row, alone)


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
        assert_within_rounding(mine, theirs)
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
        assert_same_rows(shared, alone)


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
def test_the_vision_tower_sees_a_shared_image_once(family, monkeypatch):
    model = tiny_model(family)
    seen: list[int] = []
    encode = model.vlm.base_model.get_image_features

    @wraps(encode)
    def record(pixel_values, *args, **kwargs):
        seen.append(pixel_values.numel())
        return encode(pixel_values, *args, **kwargs)

    monkeypatch.setattr(model.vlm.base_model, "get_image_features", record)
    page = model.read_page(**make_inputs(family, page_rows(1)))
    own = seen.pop()
    other = Row(["see ", None, "?"], [(3, 4)], seed=2)
    for rows, options, expected in (
        (page_rows(), {}, [own]),
        (page_rows(), {"page": page}, []),
        ([*page_rows(), other], {}, [2 * own]),
        ([*page_rows(1), other], {"page": [page, None]}, [own]),
        (page_rows(), {"skip_unread": False}, [3 * own]),
    ):
        run(model, make_inputs(family, rows), zoom="auto", gate_threshold=2, **options)
        assert seen == expected
        seen.clear()


@families
def test_two_threads_share_a_page(family):
    model = tiny_model(family)
    page = model.read_page(**make_inputs(family, page_rows(1)))
    calls = [({"zoom": "always"}, 2), ({"zoom": "auto", "gate_threshold": 2}, 3), ({"zoom": "never"}, 1)]
    calls += [({"zoom": "always", "keep_share": 0.3, "gate_branch": "light", "region_branch": "light"}, 3)]
    calls = [({**ZOOM, **options}, make_inputs(family, page_rows(count))) for options, count in calls]
    alone = [run(model, inputs, page=page, **options) for options, inputs in calls]
    results: list = []

    def work(shift: int) -> None:
        for number in range(2 * len(calls)):
            index = (number + shift) % len(calls)
            options, inputs = calls[index]
            try:
                results.append((index, run(model, inputs, page=page, **options)))
            except Exception as error:
                results.append((index, error))

    threads = [threading.Thread(target=work, args=(shift,)) for shift in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(results) == 4 * len(calls)
    for index, result in results:
        assert not isinstance(result, Exception), result
        assert_same_rows(result, alone[index])


@families
def test_nothing_is_kept_on_the_model(family):
    model = tiny_model(family)
    inputs = make_inputs(family, page_rows())
    page = model.read_page(**make_inputs(family, page_rows(1)))
    run(model, inputs, page=page, zoom="always", **ZOOM)
    hidden = weakref.ref(page.hidden)
    del page
    gc.collect()
    assert hidden() is None


@families
def test_static_caches_continue_from_a_page(family):
    model = tiny_model(family)
    page = model.read_page(**make_inputs(family, page_rows(1)))
    inputs = make_inputs(family, page_rows())
    for options in ({"zoom": "always"}, {"zoom": "auto", "gate_threshold": 2}):
        grown = run(model, inputs, page=page, **ZOOM, **options)
        static = run(model, inputs, page=page, cache_implementation="static", disable_compile=True, **ZOOM, **options)
        assert_same_rows(static, grown)


@families
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_page_waits_on_another_device(family, device):
    model = tiny_model(family).to(device)
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in make_inputs(family, page_rows()).items()
    }
    alone = {name: value.to(device) for name, value in plain_inputs(make_inputs(family, page_rows(1))).items()}
    page = model.read_page(**alone)
    waiting = page.to("cpu")
    assert waiting.device.type == "cpu" and page.device.type == device and waiting.nbytes == page.nbytes
    for options in ({"zoom": "always"}, {"zoom": "auto", "gate_threshold": 0, "gate_branch": "light"}):
        expected = run(model, inputs, page=page, **ZOOM, **options)
        for stored in (waiting, waiting.to(device)):
            assert_same_rows(run(model, inputs, page=stored, **ZOOM, **options), expected)
