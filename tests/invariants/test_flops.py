"""What a request computes under every plan, in closed form, and nothing thrown away.

FLOPs are counted over the whole `generate(max_new_tokens=1)`. The decoder's closed form is written here from the
shapes in the configuration, layer by layer as a plan lays it out; the vision tower, a class of transformers that is
called as it is, is counted by itself. The library's own closed form must agree, too.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import modeling_qzoom.zoom_decisions_qzoom as decisions
from modeling_qzoom import QZoomForConditionalGeneration
from modeling_qzoom.backbones_qzoom import spec_for_config, token_grid_of
from modeling_qzoom.cost_qzoom import PrefillCost, Prompt
from modeling_qzoom.zoom_options_qzoom import ZoomOptions, resolve_options
from tests.families import FAMILY
from tests.tiny import EVERY_TOKEN, FAMILIES, Row, make_inputs, plain_inputs, tiny_model, vlm_config


LAYERS, BRANCH_LAYER, BRANCH_DEPTH = 8, 4, 3
TOLERANCE = 0.002  # counts agree to five digits
ROW = Row(["q" * 40, None, "what is written there? " * 3], [(12, 14)], seed=1)
DONE_OVER_NEEDED = 1.02  # what issue 11 allows; the library's closed form is closer than that
PEAK = {"region_threshold": 0.9, "region_threshold_mode": "peak"}
SETTINGS = {
    "savings": {},
    "no savings": {"skip_unread": False},
    "light gate": {"gate_branch": "light"},
    "light gate, no savings": {"gate_branch": "light", "skip_unread": False},
    "light region": {"region_branch": "light"},
    "foveated": {"keep_share": 0.1},
    "foveated to nothing": {"keep_share": 0.0, "skip_unread": False},
    "everything": {"gate_branch": "light", "region_branch": "light", "keep_share": 0.1},
}


def _sdpa_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """The fused CPU kernel, which torch leaves uncounted; a causal mask counts full."""
    batch, heads, q_length, width = query_shape
    return 2 * batch * heads * q_length * key_shape[2] * (width + value_shape[3])


def count_flops(function) -> int:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: _sdpa_flops}) as counter:
        function()
    return counter.get_total_flops()


# a layer under a plan: per segment the tokens that only give keys and values, and those that are updated behind them
Segments = list[tuple[int, int]]


class ClosedForm:
    """FLOPs of a row's decoder parts, from the text configuration's numbers and the row's ids.

    Args:
        model: the model.
        inputs: inputs of one row with one image.
        options: options of the call that say who crosses which layers.
    """

    def __init__(self, model, inputs: dict, options: dict):
        config, ids = model.config, inputs["input_ids"][0]
        self.text, self.options = config.get_text_config(), ZoomOptions(**options)
        self.head_dim = getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads
        is_image = ids == config.image_token_id
        self.prompt, self.visual = len(ids), int(is_image.sum())
        self.before = int(is_image.nonzero()[0, 0])
        self.after = self.prompt - self.before - self.visual
        self.markers = FAMILY[config.vlm_config.model_type].markers

    def layer(self, segments: Segments) -> int:
        """One decoder layer."""
        text, seen, flops = self.text, 0, 0
        query_width, key_width = (
            count * self.head_dim for count in (text.num_attention_heads, text.num_key_value_heads)
        )
        for context, updated in segments:
            seen += context + updated
            flops += 2 * (context + updated) * text.hidden_size * 2 * key_width  # keys and values
            flops += 2 * updated * text.hidden_size * 2 * query_width  # queries and output
            flops += 2 * updated * seen * 2 * query_width  # attention
            flops += 2 * updated * text.hidden_size * 3 * text.intermediate_size
        return flops

    def all_of(self, tokens: int) -> Segments:
        return [(0, tokens)]

    def last_of(self, tokens: int) -> Segments:
        """The last layer over so many tokens of a call that may zoom."""
        return [(tokens - 1, 1)] if self.options.skips_unread else self.all_of(tokens)

    def branch_layer(self, kind: str) -> Segments:
        light = [(0, self.before), (self.visual, self.after)]
        return light if kind == "light" else self.all_of(self.prompt)

    def head(self) -> int:
        return 2 * self.text.hidden_size * self.text.vocab_size

    def coarse(self) -> int:
        return BRANCH_LAYER * self.layer(self.all_of(self.prompt))

    def upper(self, tokens: int) -> int:
        layers = [self.all_of(tokens)] * (LAYERS - BRANCH_LAYER - 1) + [self.last_of(tokens)]
        return sum(map(self.layer, layers))

    def gate(self) -> int:
        inner = self.branch_layer(self.options.gate_branch)
        last = self.last_of(self.prompt) if self.options.skips_unread else inner
        return sum(map(self.layer, [inner] * (BRANCH_DEPTH - 1) + [last]))

    def region(self) -> int:
        """Layers; then queries of two tokens (the asking one and the first), keys of all visual tokens, products."""
        text = self.text
        projections = 2 * text.hidden_size * self.head_dim
        projections *= 2 * text.num_attention_heads + self.visual * text.num_key_value_heads
        products = 2 * 2 * self.visual * self.head_dim * (text.num_attention_heads + 1)
        layers = (BRANCH_DEPTH - 1) * self.layer(self.branch_layer(self.options.region_branch))
        return layers + projections + products

    def skipped(self) -> int:
        """A row that may zoom and does not, without its branches."""
        return self.coarse() + self.upper(self.prompt) + self.head()

    def zoomed(self, crop: int) -> int:
        """A row that zooms, without its gate."""
        inserted = crop + self.markers
        fused, suffix = self.prompt + inserted, self.after - self.markers // 2
        chunk = [(0, inserted + suffix)]
        cached = 2 * 2 * (inserted + suffix) * (fused - inserted - suffix)
        cached *= self.text.num_attention_heads * self.head_dim  # attention to the prefix
        kept = fused - self.visual + math.ceil(self.options.keep_share * self.visual)
        below = BRANCH_LAYER * (self.layer(chunk) + cached)
        return self.coarse() + self.region() + below + self.upper(kept) + self.head()


def large_model(family: str) -> QZoomForConditionalGeneration:
    """Large enough that rotary tables and the like vanish beside the layers."""
    config = vlm_config(family, LAYERS).to_dict()
    config["text_config"] |= {
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 2048,
    }
    if not FAMILY[family].has_budget:
        config["vision_config"] |= {"image_size": 196}
    else:
        config["vision_config"] |= {"out_hidden_size": 192}
    vlm = AutoModelForImageTextToText.from_config(type(vlm_config(family)).from_dict(config)).eval()
    vlm.generation_config.eos_token_id, vlm.generation_config.pad_token_id = None, 0
    budget = FAMILY[family].budget(100, 150)
    return QZoomForConditionalGeneration.from_backbone(
        vlm, branch_layer=BRANCH_LAYER, branch_depth=BRANCH_DEPTH, zoom_config={**budget, **EVERY_TOKEN}
    )


def large_inputs(family: str, rows: list[Row]) -> dict:
    """`make_inputs`, with LLaVA images of 14 × 14 tokens."""
    if FAMILY[family].has_budget:
        return make_inputs(family, rows)
    inputs = make_inputs(family, [Row([piece for part in row.pieces for piece in _widen(part)]) for row in rows])
    images = sum(row.pieces.count(None) for row in rows)
    return {**inputs, "pixel_values": torch.randn(images, 3, 196, 196), "source_images": _sources(images)}


def _widen(piece: str | None) -> list[str]:
    return ["<image>" * 196 if piece is None else piece]


def _sources(count: int) -> list[torch.Tensor]:
    return [torch.randint(0, 255, (3, 300, 280), dtype=torch.uint8) for _ in range(count)]


class Seen:
    """Vision FLOPs of the coarse images and of every crop, counted on their own."""

    def __init__(self, model, monkeypatch):
        self.model, self.crops = model, []
        original = decisions.cut_crop

        def record(*args):
            self.crops.append(original(*args))
            return self.crops[-1]

        monkeypatch.setattr(decisions, "cut_crop", record)

    def _tower(self, pixel_values, grid) -> int:
        arguments = {} if grid is None else {"image_grid_thw": torch.as_tensor(grid)}
        return count_flops(lambda: self.model.vlm.get_image_features(pixel_values, **arguments))

    def coarse(self, inputs: dict) -> int:
        return self._tower(inputs["pixel_values"], inputs.get("image_grid_thw"))

    def crop(self) -> int:
        crop = self.crops[-1]
        return self._tower(crop.pixel_values, None if crop.patch_grid is None else [crop.patch_grid])


@pytest.fixture(params=FAMILIES)
def setting(request, monkeypatch):
    """(model, inputs of one row, vision counts)."""
    model = large_model(request.param)
    return model, large_inputs(request.param, [ROW]), Seen(model, monkeypatch)


@pytest.fixture(params=SETTINGS)
def options(request) -> dict:
    """Options that say who crosses which layers."""
    return SETTINGS[request.param]


def generate_flops(model, inputs: dict, **options) -> tuple[int, list]:
    outputs = []

    def call():
        outputs.append(model.generate(**inputs, max_new_tokens=1, return_zoom_reports=True, **options))

    return count_flops(call), outputs[0].zoom_reports


def needed(model, inputs: dict, report, options: dict) -> int:
    """What the library's closed form says that an outcome needs."""
    ids = inputs["input_ids"][0]
    image_tokens = int((ids == model.config.image_token_id).sum())
    end = int((ids == model.config.image_token_id).nonzero()[-1, 0]) + 1
    (grid,) = token_grid_of(model.config.vlm_config).token_grids(image_tokens, inputs.get("image_grid_thw"))
    mrope = spec_for_config(model.config.vlm_config).mrope
    cost = PrefillCost(model.config, resolve_options(options, (), model.config, mrope=mrope))
    return cost.of_report(Prompt(len(ids), len(ids) - end - cost.markers // 2, grid), report)


def assert_close(counted: int, expected: int) -> None:
    assert (1 - TOLERANCE) * expected <= counted <= (1 + TOLERANCE) * expected, counted / expected


@pytest.mark.parametrize("zoom", ["always", "auto"])
def test_a_zoomed_row_costs_the_closed_form(setting, options, zoom):
    model, inputs, vision = setting
    counted, (report,) = generate_flops(model, inputs, zoom=zoom, gate_threshold=0, **PEAK, **options)
    assert report.zoomed and report.crop_tokens >= 60
    form = ClosedForm(model, inputs, options)
    assert form.prompt > 250
    gate = form.gate() if zoom == "auto" else 0
    assert_close(counted, vision.coarse(inputs) + vision.crop() + gate + form.zoomed(report.crop_tokens))
    assert counted <= DONE_OVER_NEEDED * needed(model, inputs, report, options)


def test_a_skipped_row_costs_the_closed_form(setting, options):
    model, inputs, vision = setting
    counted, (report,) = generate_flops(model, inputs, zoom="auto", gate_threshold=1.5, **options)
    assert report.reason == "gate_closed"
    form = ClosedForm(model, inputs, options)
    assert_close(counted, vision.coarse(inputs) + form.gate() + form.skipped())
    assert counted <= DONE_OVER_NEEDED * needed(model, inputs, report, options)


def test_without_savings_a_skipped_row_costs_the_plain_model_and_the_gate(setting):
    model, inputs, _ = setting
    plain = count_flops(lambda: model.vlm.generate(**plain_inputs(inputs), max_new_tokens=1))
    counted, _ = generate_flops(model, inputs, zoom="auto", gate_threshold=1.5, skip_unread=False)
    assert_close(counted, plain + ClosedForm(model, inputs, {"skip_unread": False}).gate())
    counted, _ = generate_flops(model, inputs, zoom="never")
    assert counted == plain


def test_an_empty_map_costs_a_skipped_row_and_the_region_branch(setting, options):
    model, inputs, vision = setting
    counted, (report,) = generate_flops(model, inputs, zoom="always", region_threshold=1.0, **options)
    assert report.reason == "empty_map"
    form = ClosedForm(model, inputs, options)
    assert_close(counted, vision.coarse(inputs) + form.region() + form.skipped())
    assert counted <= DONE_OVER_NEEDED * needed(model, inputs, report, options)


@pytest.mark.parametrize("name", ["savings", "everything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_costs_its_rows(family, name):
    """Rows of one length: the region branch and the second pass run for the row that zooms, and for it alone."""
    model, options = large_model(family), {**PEAK, **SETTINGS[name]}
    rows = [ROW, replace(ROW, pieces=["Q" * 40, None, ROW.pieces[2].upper()], seed=2)]
    inputs, singles = large_inputs(family, rows), [large_inputs(family, [row]) for row in rows]
    if not FAMILY[family].has_budget:
        for name in ("pixel_values", "source_images"):
            singles = [{**single, name: inputs[name][row : row + 1]} for row, single in enumerate(singles)]
    _, reports = generate_flops(model, inputs, zoom="auto", gate_threshold=0, **options)
    threshold = sum(report.gate_probability for report in reports) / 2
    counts = [generate_flops(model, single, gate_threshold=threshold, **options) for single in singles]
    assert sorted(report.zoomed for _, (report,) in counts) == [False, True]
    counted, _ = generate_flops(model, inputs, gate_threshold=threshold, **options)
    assert_close(counted, sum(count for count, _ in counts))


def test_training_passes_stop_at_the_branch(setting):
    model, inputs, vision = setting
    plain, form = plain_inputs(inputs), ClosedForm(model, inputs, {"skip_unread": False})
    below = vision.coarse(inputs) + form.coarse()
    region = [torch.ones(1, 4, 4)]
    assert_close(count_flops(lambda: model(**plain, region_targets=region)), below + form.region())
    gate = torch.ones(1)
    assert_close(count_flops(lambda: model(**plain, gate_targets=gate)), below + form.gate())


class Poison(nn.Module):
    def forward(self, *args, **kwargs):
        raise AssertionError("this module must not run")


def poison_layers(model) -> None:
    layers = model.vlm.get_decoder().layers
    for index in range(model.config.branch_layer, len(layers)):
        layers[index] = Poison()
    model.vlm.lm_head = Poison()


@pytest.mark.parametrize("family", FAMILIES)
def test_branch_training_never_touches_the_layers_above(family):
    model, inputs = tiny_model(family), plain_inputs(make_inputs(family, [Row(["a", None, "?"], [(3, 4)])]))
    poison_layers(model)
    output = model(**inputs, region_targets=[torch.ones(1, 3, 4)], gate_targets=torch.ones(1))
    output.loss.backward()
    with pytest.raises(AssertionError, match="must not run"):
        model(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_branch_runs_only_where_it_is_asked(family):
    inputs = make_inputs(family, [Row(["a", None, "?"], [(3, 4)])])
    model = tiny_model(family)
    model.zoom.region = Poison()
    assert generate_flops(model, inputs, gate_threshold=1.5)[1][0].reason == "gate_closed"
    model(**plain_inputs(inputs), gate_targets=torch.ones(1))
    with pytest.raises(AssertionError, match="must not run"):
        generate_flops(model, inputs, gate_threshold=0)
    model.zoom.gate = Poison()
    assert generate_flops(model, inputs, zoom="never")[1][0].reason == "off"
    text = make_inputs(family, [Row(["no image"])])
    assert generate_flops(model, text, zoom="auto")[1][0].reason in ("no_image", "off")
    model = tiny_model(family)
    model.zoom.gate = Poison()
    assert generate_flops(model, inputs, zoom="always", **PEAK)[1][0].zoomed
    model(**plain_inputs(inputs), region_targets=[torch.ones(1, 3, 4)])
    with pytest.raises(AssertionError, match="must not run"):
        generate_flops(model, inputs, zoom="auto")
