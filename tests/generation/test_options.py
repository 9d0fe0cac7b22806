"""Zoom options: where they may be given, which source wins, and what they change."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from modeling_qzoom import QZoomConfig
from modeling_qzoom.zoom_crops_qzoom import crop_recipe
from modeling_qzoom.zoom_options_qzoom import ZoomOptions, resolve_options
from tests.generation_fixtures import always, box_of, mixed, no_zoom, shared_model
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model, vlm_config


families = pytest.mark.parametrize("family", FAMILIES)

PRESETS = {
    "fast": {"gate_threshold": 0.9, "crop_max_tokens": 4},
    "accurate": {"gate_threshold": 0.2, "crop_max_tokens": 40, "zoom": "always"},
}


def config(family="qwen2_5_vl", **fields):
    return QZoomConfig(vlm_config=vlm_config(family), branch_layer=3, branch_depth=2, presets=PRESETS, **fields)


def resolve(call=None, *generation, mrope=True, **fields):
    names = ("zoom", "effort", "gate_threshold", "region_threshold", "crop_min_tokens", "crop_max_tokens")
    given = {**dict.fromkeys(names), **(call or {})}
    return resolve_options(given, [GenerationConfig(**entry) for entry in generation], config(**fields), mrope=mrope)


def one_row(family="qwen2_5_vl"):
    return make_inputs(family, [Row(["look ", None, " here"], [(3, 4)], 1)])


def report_of(model, inputs=None, **options):
    inputs = one_row(model.config.vlm_config.model_type) if inputs is None else inputs
    return model.generate(**inputs, max_new_tokens=1, return_zoom_reports=True, **options).zoom_reports[0]


def test_defaults_come_from_the_config():
    assert resolve() == ZoomOptions()
    assert resolve(gate_threshold=0.3, zoom="always") == ZoomOptions(gate_threshold=0.3, zoom="always")


def test_call_wins_over_generation_configs_over_config():
    layers = [{"gate_threshold": 0.2}, {"gate_threshold": 0.3, "region_threshold": 0.33}]
    options = resolve({"gate_threshold": 0.1}, *layers, gate_threshold=0.4, region_threshold=0.44)
    assert (options.gate_threshold, options.region_threshold) == (0.1, 0.33)
    assert resolve({}, *layers, gate_threshold=0.4).gate_threshold == 0.2
    assert resolve({}, {}, layers[1], gate_threshold=0.4).gate_threshold == 0.3
    assert resolve({}, {}, {}, gate_threshold=0.4).gate_threshold == 0.4


def test_zero_is_a_value():
    options = resolve({"gate_threshold": 0, "region_threshold": 0.0}, {"gate_threshold": 0.5})
    assert (options.gate_threshold, options.region_threshold) == (0, 0)


@pytest.mark.parametrize("level", ["call", "generation config", "config"])
def test_presets_at_every_level(level):
    if level == "call":
        options = resolve({"effort": "fast"}, gate_threshold=0.4)
    elif level == "generation config":
        options = resolve({}, {"effort": "fast"}, gate_threshold=0.4)
    else:
        options = resolve(effort="fast", gate_threshold=0.4)
    assert (options.gate_threshold, options.crop_max_tokens) == (0.9, 4)


def test_explicit_options_win_over_the_preset_beside_them():
    options = resolve({"effort": "fast", "gate_threshold": 0.05})
    assert (options.gate_threshold, options.crop_max_tokens) == (0.05, 4)
    options = resolve({}, {"effort": "fast", "gate_threshold": 0.05})
    assert (options.gate_threshold, options.crop_max_tokens) == (0.05, 4)


def test_presets_win_over_everything_below_them():
    below = {"gate_threshold": 0.6, "effort": "accurate"}
    options = resolve({"effort": "fast"}, below, crop_max_tokens=9, effort="accurate")
    assert (options.gate_threshold, options.crop_max_tokens) == (0.9, 4)
    assert options.zoom == "always"  # fast leaves it open, accurate below sets it
    # an explicit option anywhere above the preset wins
    assert resolve({"gate_threshold": 0.05}, {"effort": "fast"}, effort="accurate").gate_threshold == 0.05


@pytest.mark.parametrize(
    ("call", "generation", "fields", "budget"),
    [
        ({"crop_min_tokens": 200}, {}, {"crop_max_tokens": 144}, (200, 200)),
        ({"crop_max_tokens": 2}, {}, {"crop_min_tokens": 4, "crop_max_tokens": 64}, (2, 2)),
        ({"crop_max_tokens": 8}, {"crop_min_tokens": 16}, {}, (8, 8)),
        ({}, {"crop_min_tokens": 70}, {"crop_max_tokens": 64}, (70, 70)),
        ({"crop_min_tokens": 6, "effort": "fast"}, {}, {}, (6, 6)),
        ({"crop_min_tokens": 6}, {"effort": "fast"}, {"crop_max_tokens": 64}, (6, 6)),
        ({"crop_min_tokens": 9}, {}, {"crop_max_tokens": 64}, (9, 64)),
    ],
)
def test_crop_bounds_move_the_opposite_one_of_a_weaker_source(call, generation, fields, budget):
    options = resolve(call, generation, **fields)
    assert (options.crop_min_tokens, options.crop_max_tokens) == budget


@pytest.mark.parametrize("place", ["call", "generation config"])
def test_crossing_crop_bounds_of_one_source_are_an_error(place):
    bounds = {"crop_min_tokens": 9, "crop_max_tokens": 5}
    with pytest.raises(ValueError, match=r"crop_min_tokens \(9\) is larger than crop_max_tokens \(5\)"):
        resolve(bounds, crop_max_tokens=64) if place == "call" else resolve({}, bounds, crop_max_tokens=64)


@pytest.mark.parametrize("bad", [0, "9", True])
def test_a_bad_crop_bound_is_named_even_where_it_crosses(bad):
    with pytest.raises(ValueError, match=f"crop_max_tokens must be a positive number .*, got {bad!r}"):
        resolve({"crop_max_tokens": bad}, crop_min_tokens=4)


def test_numpy_scalars_become_python_numbers():
    options = resolve(
        {"gate_threshold": np.float32(0.5), "crop_max_tokens": np.int64(64)}, {"region_threshold": np.int8(0)}
    )
    assert options == ZoomOptions(gate_threshold=0.5, region_threshold=0, crop_max_tokens=64)
    assert [type(value) for value in (options.gate_threshold, options.crop_max_tokens)] == [float, int]
    with pytest.raises(ValueError, match="gate_threshold must be a finite number"):
        resolve({"gate_threshold": np.bool_(True)})
    with pytest.raises(ValueError, match="crop_max_tokens must be a positive number"):
        resolve({"crop_max_tokens": np.float32(4)})


def test_numpy_scalars_in_a_config_can_be_saved(tmp_path):
    fields = {"gate_threshold": np.float32(0.5), "presets": {"large": {"crop_max_tokens": np.int64(64)}}}
    QZoomConfig(vlm_config=vlm_config("qwen2_5_vl"), branch_layer=3, branch_depth=2, **fields).save_pretrained(
        tmp_path
    )
    loaded = QZoomConfig.from_pretrained(tmp_path)
    assert (loaded.gate_threshold, loaded.presets) == (0.5, {"large": {"crop_max_tokens": 64}})


@pytest.mark.parametrize("level", ["call", "generation config"])
def test_unknown_presets_list_the_known_ones(level):
    message = r"effort='turbo' is not a preset of this checkpoint \(presets: \['accurate', 'fast'\]\)"
    with pytest.raises(ValueError, match=message):
        resolve({"effort": "turbo"}) if level == "call" else resolve({}, {"effort": "turbo"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoom": "maybe"}, r"zoom must be one of \['auto', 'always', 'never'\], got 'maybe'"),
        ({"zoom": True}, "zoom must be one of"),
        ({"gate_threshold": -0.5}, "gate_threshold must be a finite number ≥ 0 .*, got -0.5"),
        ({"gate_threshold": "0.5"}, "gate_threshold must be a finite number"),
        ({"gate_threshold": float("inf")}, "gate_threshold must be a finite number"),
        ({"gate_threshold": True}, "gate_threshold must be a finite number"),
        ({"region_threshold": -1}, "region_threshold must be a finite number"),
        ({"region_threshold_mode": "max"}, r"region_threshold_mode must be one of \['absolute', 'peak'\]"),
        ({"crop_min_tokens": 0}, "crop_min_tokens must be a positive number of merged visual tokens"),
        ({"crop_max_tokens": 2.5}, "crop_max_tokens must be a positive number"),
        ({"crop_min_tokens": 9, "crop_max_tokens": 5}, r"crop_min_tokens \(9\) is larger than crop_max_tokens \(5\)"),
        ({"position_alignment": "nested"}, r"position_alignment must be one of \['continuous', 'sequential'\]"),
        ({"effort": "fast"}, r"effort='fast' is not a preset .*\(presets: none; set thresholds"),
    ],
)
@pytest.mark.parametrize("place", ["call", "generation config"])
def test_each_misuse_has_its_own_message(options, message, place):
    if place == "generation config":
        options = {"generation_config": GenerationConfig(**options)}
    with pytest.raises(ValueError, match=message):
        shared_model("qwen2_5_vl").generate(**one_row(), **options, max_new_tokens=1)


def test_options_are_checked_even_where_they_do_not_matter():
    text = make_inputs("qwen2_5_vl", [Row(["words"], [], 0)])
    with pytest.raises(ValueError, match="gate_threshold"):
        shared_model("qwen2_5_vl").generate(**text, gate_threshold=-1, max_new_tokens=1)


def test_llava_has_no_continuous_positions():
    with pytest.raises(ValueError, match="position_alignment='continuous' needs fractional .* pass 'sequential'"):
        report_of(shared_model("llava"), position_alignment="continuous")
    assert report_of(shared_model("llava"), **always(position_alignment="sequential")).zoomed


def test_llava_crops_have_one_size():
    for name in ("crop_min_tokens", "crop_max_tokens"):
        with pytest.raises(ValueError, match="do not apply: crops of this backbone always have 16 tokens"):
            report_of(shared_model("llava"), **always(), **{name: 8})
    words = make_inputs("llava", [Row(["words"], [], 0)])
    with pytest.raises(ValueError, match="do not apply: crops of this backbone"):
        report_of(shared_model("llava"), words, crop_max_tokens=8)
    assert report_of(shared_model("llava"), **always()).crop_tokens == 16


def test_an_unknown_crop_budget_is_an_error():
    model = tiny_model("qwen2_5_vl", min_tokens=None, max_tokens=None)
    with pytest.raises(ValueError, match="the crop's budget is unknown: neither crop_max_tokens .* nor max_tokens"):
        report_of(model, **always())
    assert report_of(model, **always(), crop_max_tokens=9).crop_tokens <= 9
    assert model.generate(**one_row(), zoom="never", max_new_tokens=1).shape[0] == 1


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, (4, 24)),
        ({"crop_max_tokens": 40}, (4, 40)),
        ({"crop_max_tokens": 2}, (2, 2)),
        ({"crop_min_tokens": 6}, (6, 24)),
        ({"crop_min_tokens": 30}, (30, 30)),
        ({"crop_min_tokens": 5, "crop_max_tokens": 7}, (5, 7)),
    ],
)
def test_one_side_of_the_budget_moves_the_other_out_of_its_way(options, budget):
    model = shared_model("qwen2_5_vl")
    recipe = crop_recipe(model.config, ZoomOptions(**options))
    assert (recipe.min_tokens, recipe.max_tokens) == budget


@families
def test_thresholds_of_the_gate(family):
    """0 always zooms, above 1 never, in between the probability decides; the gate runs in all three cases."""
    model = shared_model(family)
    base = always(zoom="auto")
    zero = report_of(model, **base, gate_threshold=0)
    probability = zero.gate_probability
    assert zero.zoomed and 0 < probability < 1
    closed = report_of(model, **base, gate_threshold=1.01)
    assert not closed.zoomed and closed.reason == "gate_closed" and closed.gate_probability == probability
    assert report_of(model, **base, gate_threshold=probability).zoomed  # reached counts as open
    assert not report_of(model, **base, gate_threshold=probability + 1e-6).zoomed


@families
@pytest.mark.parametrize("zoom", ["always", "never"])
def test_always_and_never_do_not_run_the_gate(family, zoom, monkeypatch):
    model = shared_model(family)

    def poisoned(*args, **kwargs):
        raise AssertionError("the gate ran")

    monkeypatch.setattr(model.zoom.gate, "forward", poisoned)
    report = report_of(model, **always(zoom=zoom))
    assert report.gate_probability is None and report.zoomed is (zoom == "always")
    with pytest.raises(AssertionError, match="the gate ran"):
        report_of(model, **always(zoom="auto"))


@families
def test_never_runs_no_part_of_the_branches_and_needs_no_sources(family, monkeypatch):
    model = shared_model(family)

    def refuse(*args, **kwargs):
        raise AssertionError("a branch runs")

    for branch in (model.zoom.gate, model.zoom.region):
        monkeypatch.setattr(branch, "forward", refuse)
    inputs = plain_inputs(one_row(family))
    assert model.generate(**inputs, zoom="never", max_new_tokens=3).equal(
        model.vlm.generate(**inputs, max_new_tokens=3)
    )


@families
def test_without_a_gate_auto_means_always(family):
    model = tiny_model(family, has_gate=False)
    for threshold in (0.0, 0.5, 2.0):
        report = report_of(model, **always(zoom="auto"), gate_threshold=threshold)
        assert (report.zoomed, report.reason, report.gate_probability) == (True, "forced", None)
    assert report_of(model, zoom="never").reason == "off"


@families
def test_options_on_the_model_s_generation_config(family, monkeypatch):
    model = shared_model(family)
    for name, value in always().items():
        monkeypatch.setattr(model.generation_config, name, value, raising=False)
    assert report_of(model).reason == "forced"
    assert report_of(model, generation_config=GenerationConfig(max_new_tokens=2)).reason == "forced"
    assert report_of(model, generation_config=GenerationConfig(zoom="never")).reason == "off"
    assert report_of(model, zoom="never").reason == "off"


@families
def test_options_on_the_call_s_generation_config(family):
    model = shared_model(family)
    settings = GenerationConfig(**always(), return_zoom_reports=True, max_new_tokens=1)
    output = model.generate(**one_row(family), generation_config=settings)
    assert output.zoom_reports[0].reason == "forced"
    # a keyword that exists on the generation config arrives from the call all the same
    output = model.generate(**one_row(family), generation_config=settings, zoom="auto", gate_threshold=1.5)
    assert output.zoom_reports[0].reason == "gate_closed"
    plain = model.generate(**one_row(family), generation_config=settings, return_zoom_reports=False)
    assert isinstance(plain, torch.Tensor)


def test_presets_reach_the_crop():
    model = tiny_model("qwen2_5_vl", presets={"tiny": {"crop_max_tokens": 2}, "large": {"crop_min_tokens": 20}})
    tokens = {effort: report_of(model, **always(), effort=effort).crop_tokens for effort in ("tiny", "large", None)}
    assert tokens["tiny"] <= 2 < tokens["large"] and tokens["large"] >= 20
    assert report_of(model, **always(), effort="tiny", crop_max_tokens=6).crop_tokens > 2
    model.config.effort = "tiny"
    assert report_of(model, **always()).crop_tokens == tokens["tiny"]


@families
def test_region_thresholds_move_the_box(family):
    model = shared_model(family)
    reports = {share: report_of(model, **always(region_threshold=share)) for share in (0.0, 0.9, 0.999)}
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (reports[share].box for share in reports)]
    assert areas[0] > areas[-1] and areas == sorted(areas, reverse=True)
    absolute = 0.999 * float(reports[0.999].heatmap.max())
    same = report_of(model, zoom="always", region_threshold=absolute, region_threshold_mode="absolute")
    assert same.box == reports[0.999].box and box_of(same, 0.999) == box_of(reports[0.999], 0.999)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_alignment_changes_positions_only(family):
    model = shared_model(family)
    settings = {"max_new_tokens": 1, "output_logits": True, "return_zoom_reports": True}
    outputs = [
        model.generate(**one_row(family), **always(), **settings, position_alignment=alignment)
        for alignment in ("continuous", "sequential", None)
    ]
    first, second, default = (output.logits[0] for output in outputs)
    assert default.equal(first) and (first - second).abs().max() > 1e-3
    assert outputs[0].zoom_reports[0].box == outputs[1].zoom_reports[0].box


@families
def test_all_gates_closed_is_the_plain_backbone_bit_for_bit(family):
    inputs, _ = mixed(family)
    settings = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    expected = shared_model(family).vlm.generate(**plain_inputs(inputs), **settings)
    for options in ({**no_zoom(), "skip_unread": False}, {"zoom": "never"}):
        got = shared_model(family).generate(**inputs, **options, **settings)
        assert torch.stack(got.logits).equal(torch.stack(expected.logits))
