"""A batch equals its rows run alone: 200 random mixed batches over three families."""

import random
from collections import Counter

import pytest
import torch

import modeling_qzoom.zoom_decisions_qzoom as decisions
from modeling_qzoom.zoom_crops_qzoom import CropError
from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model


# (family, branch_layer, branch_depth, batches)
VARIANTS = [
    ("qwen2_5_vl", 3, 2, 67),
    ("qwen3_vl", 3, 2, 34),
    ("qwen3_vl", 1, 3, 33),  # the branches tap in the middle of the DeepStack layers
    ("llava", 2, 1, 66),
]
VARIANTS += [(family, 3, 2, 67) for family in FAMILIES if family not in {variant[0] for variant in VARIANTS}]
GRIDS = [(1, 1), (1, 5), (4, 1), (2, 3), (4, 4), (3, 6), (6, 2)]
CELL_MARGIN, GATE_MARGIN, PEAK_MARGIN, RANK_MARGIN = 1e-3, 1e-3, 1e-4, 1e-6
NEW_TOKENS = 3
# what a map must reach
PEAK_RULES = {
    "region_min_peak": lambda heatmap: float(heatmap.max()),
    "region_min_contrast": lambda heatmap: float(heatmap.max() / (heatmap.mean() + 1e-8)),
}


def random_row(rng: random.Random) -> Row:
    """Zero to three images, text before, between or after them, one to three turns."""
    pieces: list[str | None] = []
    grids = []
    images = rng.choice([0, 1, 1, 1, 1, 2, 3])
    for turn in range(rng.choice([1, 1, 2, 3])):
        turn_images = images if turn == 0 else rng.choice([0, 0, 1]) if images else 0
        content: list[str | None] = [None] * turn_images
        content.insert(rng.randrange(len(content) + 1), "q" * rng.randrange(1, 12) + str(rng.randrange(100)))
        grids += [rng.choice(GRIDS) for _ in range(turn_images)]
        pieces += ["<|im_start|>user\n", *content, "<|im_end|>\n<|im_start|>assistant\n"]
    return Row(pieces, grids, seed=rng.randrange(10**6))


def widest_gap(values: list[float], rng: random.Random) -> float:
    """The middle of one of the three widest gaps between values."""
    values = sorted(values)
    gaps = sorted(zip((b - a for a, b in zip(values, values[1:])), values, values[1:]), reverse=True)
    _, low, high = rng.choice(gaps[:3])
    return (low + high) / 2


class Spy:
    """Records every heat map that `decide` makes."""

    def __init__(self, monkeypatch):
        self.maps: list[torch.Tensor] = []
        original = decisions.region_heatmap

        def record(*args):
            self.maps.append(original(*args))
            return self.maps[-1]

        monkeypatch.setattr(decisions, "region_heatmap", record)

    def take(self) -> list[torch.Tensor]:
        maps, self.maps[:] = list(self.maps), []
        return maps


def choose_options(family: str, model, inputs: dict, spy: Spy, rng: random.Random) -> dict:
    """Options whose thresholds lie between the values that they are compared with."""
    plans = {name: rng.choice(["full", "light"]) for name in ("gate_branch", "region_branch")}
    plans |= {"keep_share": rng.choice([1.0, 1.0, 0.5, 0.1, 0.0]), "skip_unread": rng.choice([None, True, False])}
    plans["keep_margin"] = rng.choice([0, 1])
    probe = model.generate(
        **inputs, **plans, zoom="auto", gate_threshold=0, return_zoom_reports=True, max_new_tokens=1
    )
    gates = [report.gate_probability for report in probe.zoom_reports if report.gate_probability is not None]
    cells = [value for heatmap in spy.take() for value in heatmap.flatten().tolist()]
    mode = rng.choice(["absolute", "absolute", "peak"])
    options = {**plans, "zoom": rng.choice(["auto", "auto", "always"]), "region_threshold_mode": mode}
    options["region_threshold"] = rng.choice([0.65, 0.85]) if mode == "peak" else 0.5
    if mode == "absolute" and len(cells) > 1:
        middle = sorted(cells)[len(cells) // 4 : 1 + 9 * len(cells) // 10]
        options["region_threshold"] = widest_gap(middle if len(middle) > 1 else cells, rng)
    if options["zoom"] == "auto":
        options["gate_threshold"] = widest_gap(gates, rng) if len(gates) > 1 else rng.choice([0.01, 0.99])
    if FAMILY[family].has_budget:
        options["crop_max_tokens"] = rng.choice([6, 12, 24])
        options["position_alignment"] = rng.choice(["continuous", "sequential"])
        options["crop_budget"] = rng.choice(["fixed", "need", "visionrl2"])
        options["crop_min_tokens"] = rng.choice([1, 4])
    options["region_blur"] = rng.choice(["fixed", "grid"])
    rule = rng.choice(["region_min_peak", "region_min_contrast", None, None])
    if rule is not None:
        values = [PEAK_RULES[rule](report.heatmap) for report in probe.zoom_reports if report.heatmap is not None]
        options[rule] = widest_gap(values, rng) if len(values) > 1 else 0.5 * values[0]
    return options


def has_tie(maps: list[torch.Tensor], report, options: dict) -> bool:
    """Whether rounding could decide: gate, chosen image or foreground cells of one row."""
    probability = report.gate_probability
    if probability is not None and abs(probability - options.get("gate_threshold", 2)) < GATE_MARGIN:
        return True
    peaks = sorted((float(heatmap.max()) for heatmap in maps), reverse=True)
    if len(peaks) > 1 and peaks[0] - peaks[1] < PEAK_MARGIN:
        return True
    if report.heatmap is None:
        return False
    ranks = report.heatmap.flatten().sort().values
    if options["keep_share"] < 1 and bool((ranks.diff().abs() < RANK_MARGIN).any()):
        return True
    for rule, of_map in PEAK_RULES.items():
        reached = of_map(report.heatmap)
        if abs(reached - options.get(rule, 0)) < CELL_MARGIN * reached:
            return True
    level = options["region_threshold"]
    level = level * report.heatmap.max() if options["region_threshold_mode"] == "peak" else level
    return bool(((report.heatmap - level).abs() < CELL_MARGIN).any())


def run(model, inputs: dict, **options):
    arguments = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_zoom_reports": True, "do_sample": False}
    return model.generate(**inputs, **{**arguments, **options})


def assert_same_row(batch, row: int, alone) -> None:
    """Reports, logits and tokens of one row of a batch, against that row's own run."""
    ours, theirs = batch.zoom_reports[row], alone.zoom_reports[0]
    for name in ("zoomed", "reason", "empty_rule", "image_index", "box", "coarse_tokens", "crop_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name
    if theirs.gate_probability is None:
        assert ours.gate_probability is None
    else:
        assert abs(ours.gate_probability - theirs.gate_probability) < 1e-5
    if theirs.heatmap is not None:
        torch.testing.assert_close(ours.heatmap, theirs.heatmap, atol=1e-4, rtol=0)
    for step, (batch_logits, logits) in enumerate(zip(batch.logits, alone.logits)):
        assert float((batch_logits[row] - logits[0]).abs().max()) < 1e-4, f"logits of step {step}"
        column = step - NEW_TOKENS
        if batch.sequences[row, column] != alone.sequences[0, column]:
            best, second = logits[0].topk(2).values
            assert best - second < 1e-3, f"token {step}"
            return


def check_batches(variant: tuple, monkeypatch) -> Counter:
    """Compares random batches with their rows; returns what happened to the rows."""
    family, branch_layer, branch_depth, batches = variant
    model = tiny_model(family, branch_layer=branch_layer, branch_depth=branch_depth)
    spy, seen, boxes = Spy(monkeypatch), Counter(), set()
    for number in range(batches):
        rng = random.Random(f"{family} {branch_layer} {number}")
        while True:
            rows = [random_row(rng) for _ in range(rng.randrange(1, 6))]
            inputs = make_inputs(family, rows)
            options = choose_options(family, model, inputs, spy, rng) if any(row.grids for row in rows) else {}
            singles, tied = [], False
            for row in rows:
                singles.append(run(model, make_inputs(family, [row]), **options))
                tied |= has_tie(spy.take(), singles[-1].zoom_reports[0], options)
            if not tied:
                break
            seen["redrawn"] += 1
        batch = run(model, inputs, **options)
        spy.take()
        for row, alone in enumerate(singles):
            assert_same_row(batch, row, alone)
            boxes.add(alone.zoom_reports[0].box)
        zoomed = [report.zoomed for report in batch.zoom_reports]
        seen.update(report.reason for report in batch.zoom_reports)
        seen.update(report.empty_rule for report in batch.zoom_reports)
        seen["mixed"] += 0 < sum(zoomed) < len(zoomed)
        seen["batches"] += 1
        seen["other image"] += sum(bool(report.image_index) for report in batch.zoom_reports)
    seen["boxes"] = len(boxes)
    return seen


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant[0]}-{variant[1]}")
def test_random_batches_equal_their_rows(variant, monkeypatch):
    seen = check_batches(variant, monkeypatch)
    # what the draws must have covered for this test to mean something
    for reason in ("gate_open", "gate_closed", "forced", "no_image", "empty_map", "other image"):
        assert seen[reason] >= 5, seen
    assert all(seen[rule] >= 2 for rule in PEAK_RULES), seen
    assert seen["mixed"] >= seen["batches"] // 3 and seen["boxes"] >= 2 * seen["batches"] // 5, seen
    assert seen["redrawn"] <= seen["batches"] // 2, seen


def test_the_variants_make_two_hundred_batches():
    assert sum(variant[3] for variant in VARIANTS) >= 200


class _SomeCropsFail:
    """`cut_crop` that fails for sources of one size."""

    def __init__(self, monkeypatch, size: tuple[int, int]):
        self.original, self.size = decisions.cut_crop, size
        monkeypatch.setattr(decisions, "cut_crop", self)

    def __call__(self, source, box, recipe):
        if tuple(source.shape[1:]) == self.size:
            raise CropError("no crop")
        return self.original(source, box, recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_whose_crop_fails_is_answered_from_the_coarse_view(family, monkeypatch):
    model = tiny_model(family)
    rows = [Row(["see ", None, "a?"], [(3, 4)], seed=1), Row([None, "and this one?"], [(4, 2)], seed=2)]
    inputs, alone = make_inputs(family, rows), make_inputs(family, rows[1:])
    _SomeCropsFail(monkeypatch, tuple(alone["source_images"][0].shape[1:]))
    options = {"zoom": "always", "region_threshold": 0.7, "region_threshold_mode": "peak", "skip_unread": False}
    batch, single = run(model, inputs, **options), run(model, alone, **options)
    assert [report.reason for report in batch.zoom_reports] == ["forced", "crop_failed"]
    assert batch.zoom_reports[1].box is not None and batch.zoom_reports[1].crop_tokens == 0
    assert_same_row(batch, 1, single)
    plain = model.vlm.generate(
        **plain_inputs(alone), max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(single.logits, plain.logits))
