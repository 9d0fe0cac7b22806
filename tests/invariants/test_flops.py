"""What a request computes, in closed form, and nothing thrown away.

FLOPs are counted over the whole `generate(max_new_tokens=1)`. The decoder's closed form is written from the shapes in
the configuration; the vision tower, a class of transformers that is called as it is, is counted by itself.
"""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import modeling_qzoom.zoom_decisions_qzoom as decisions
from modeling_qzoom import QZoomForConditionalGeneration
from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, tiny_model, vlm_config


LAYERS, BRANCH_LAYER, BRANCH_DEPTH = 8, 4, 3
TOLERANCE = 0.002  # counts agree to five digits
ROW = Row(["q" * 40, None, "what is written there? " * 3], [(12, 14)], seed=1)
PEAK = {"region_threshold": 0.9, "region_threshold_mode": "peak"}


def _sdpa_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """The fused CPU kernel, which torch leaves uncounted; a causal mask counts full."""
    batch, heads, q_length, width = query_shape
    return 2 * batch * heads * q_length * key_shape[2] * (width + value_shape[3])


def count_flops(function) -> int:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: _sdpa_flops}) as counter:
        function()
    return counter.get_total_flops()


class ClosedForm:
    """FLOPs of decoder parts, from the text configuration's numbers."""

    def __init__(self, config):
        text = config.get_text_config()
        self.hidden, self.mlp, self.vocabulary = text.hidden_size, text.intermediate_size, text.vocab_size
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or self.hidden // self.heads

    def layer(self, queries: int, keys: int) -> int:
        """One decoder layer on `queries` tokens that attend to `keys` tokens."""
        queries_and_output = 2 * 2 * queries * self.hidden * self.heads * self.head_dim
        keys_and_values = 2 * 2 * queries * self.hidden * self.kv_heads * self.head_dim
        attention = 2 * 2 * queries * keys * self.heads * self.head_dim
        return queries_and_output + keys_and_values + attention + 3 * 2 * queries * self.hidden * self.mlp

    def scorer(self, visual: int) -> int:
        """Queries of two tokens (the asking one and the first), keys of all visual tokens, their products."""
        projections = 2 * self.hidden * self.head_dim * (2 * self.heads + visual * self.kv_heads)
        return projections + 2 * 2 * visual * self.head_dim * (self.heads + 1)

    def head(self) -> int:
        return 2 * self.hidden * self.vocabulary

    def coarse(self, prompt: int) -> int:
        return BRANCH_LAYER * self.layer(prompt, prompt)

    def gate(self, prompt: int) -> int:
        return BRANCH_DEPTH * self.layer(prompt, prompt)

    def region(self, prompt: int, visual: int) -> int:
        return (BRANCH_DEPTH - 1) * self.layer(prompt, prompt) + self.scorer(visual)

    def second_pass(self, chunk: int, fused: int) -> int:
        return BRANCH_LAYER * self.layer(chunk, fused) + (LAYERS - BRANCH_LAYER) * self.layer(fused, fused)


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
        vlm, branch_layer=BRANCH_LAYER, branch_depth=BRANCH_DEPTH, zoom_config=budget
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
    """(model, inputs of one row, closed form, vision counts)."""
    model = large_model(request.param)
    return model, large_inputs(request.param, [ROW]), ClosedForm(model.config), Seen(model, monkeypatch)


def generate_flops(model, inputs: dict, **options) -> tuple[int, list]:
    outputs = []

    def call():
        outputs.append(model.generate(**inputs, max_new_tokens=1, return_zoom_reports=True, **options))

    return count_flops(call), outputs[0].zoom_reports


def zoomed_form(model, inputs: dict, form: ClosedForm, report) -> int:
    """Decoder FLOPs of a row that zooms without asking the gate."""
    ids = inputs["input_ids"][0]
    prompt, visual = len(ids), int((ids == model.config.image_token_id).sum())
    markers = FAMILY[model.config.vlm_config.model_type].markers
    end = int((ids == model.config.image_token_id).nonzero()[-1, 0]) + 1 + markers // 2
    chunk = report.crop_tokens + markers + prompt - end
    return (
        form.coarse(prompt)
        + form.region(prompt, visual)
        + form.second_pass(chunk, prompt + report.crop_tokens + markers)
        + form.head()
    )


def assert_close(counted: int, expected: int) -> None:
    assert (1 - TOLERANCE) * expected <= counted <= (1 + TOLERANCE) * expected, counted / expected


@pytest.mark.parametrize("zoom", ["always", "auto"])
def test_a_zoomed_row_costs_the_closed_form(setting, zoom):
    model, inputs, form, vision = setting
    counted, (report,) = generate_flops(model, inputs, zoom=zoom, gate_threshold=0, **PEAK)
    assert report.zoomed and report.crop_tokens >= 60
    prompt = inputs["input_ids"].shape[1]
    assert prompt > 250
    gate = form.gate(prompt) if zoom == "auto" else 0
    expected = vision.coarse(inputs) + vision.crop() + gate + zoomed_form(model, inputs, form, report)
    assert_close(counted, expected)


def test_a_skipped_row_costs_the_plain_model_and_the_gate(setting):
    model, inputs, form, _ = setting
    plain = count_flops(lambda: model.vlm.generate(**plain_inputs(inputs), max_new_tokens=1))
    counted, (report,) = generate_flops(model, inputs, zoom="auto", gate_threshold=1.5)
    assert report.reason == "gate_closed"
    assert_close(counted, plain + form.gate(inputs["input_ids"].shape[1]))
    counted, _ = generate_flops(model, inputs, zoom="never")
    assert counted == plain


def test_an_empty_map_costs_the_plain_model_and_the_region_branch(setting):
    model, inputs, form, _ = setting
    plain = count_flops(lambda: model.vlm.generate(**plain_inputs(inputs), max_new_tokens=1))
    counted, (report,) = generate_flops(model, inputs, zoom="always", region_threshold=1.0)
    assert report.reason == "empty_map"
    ids = inputs["input_ids"]
    region = form.region(ids.shape[1], int((ids == model.config.image_token_id).sum()))
    assert_close(counted, plain + region)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_costs_its_rows(family):
    """Rows of one length: the region branch and the second pass run for the row that zooms, and for it alone."""
    model = large_model(family)
    rows = [ROW, Row(["Q" * 40, None, ROW.pieces[2].upper()], ROW.grids, seed=2)]
    inputs, singles = large_inputs(family, rows), [large_inputs(family, [row]) for row in rows]
    if not FAMILY[family].has_budget:
        for name in ("pixel_values", "source_images"):
            singles = [{**single, name: inputs[name][row : row + 1]} for row, single in enumerate(singles)]
    _, reports = generate_flops(model, inputs, zoom="auto", gate_threshold=0, **PEAK)
    threshold = sum(report.gate_probability for report in reports) / 2
    counts = [generate_flops(model, single, gate_threshold=threshold, **PEAK) for single in singles]
    assert sorted(report.zoomed for _, (report,) in counts) == [False, True]
    counted, _ = generate_flops(model, inputs, gate_threshold=threshold, **PEAK)
    assert_close(counted, sum(count for count, _ in counts))


def test_training_passes_stop_at_the_branch(setting):
    model, inputs, form, vision = setting
    ids, plain = inputs["input_ids"], plain_inputs(inputs)
    prompt, visual = ids.shape[1], int((ids == model.config.image_token_id).sum())
    below = vision.coarse(inputs) + form.coarse(prompt)
    region = [torch.ones(1, 4, 4)]
    assert_close(count_flops(lambda: model(**plain, region_targets=region)), below + form.region(prompt, visual))
    gate = torch.ones(1)
    assert_close(count_flops(lambda: model(**plain, gate_targets=gate)), below + form.gate(prompt))


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
