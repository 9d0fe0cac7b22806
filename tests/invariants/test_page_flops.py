"""N questions about one page cost one page and N times what stands behind it, counted and in closed form."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from modeling_qzoom import QZoomConfig
from modeling_qzoom.cost_qzoom import PrefillCost, Prompt
from modeling_qzoom.cost_vision_qzoom import VisionCost
from modeling_qzoom.zoom_options_qzoom import ZoomOptions
from tests.families import FAMILY
from tests.invariants.test_flops import (
    BRANCH_DEPTH,
    BRANCH_LAYER,
    LAYERS,
    PEAK,
    Seen,
    assert_close,
    count_flops,
    generate_flops,
    large_inputs,
    large_model,
)
from tests.tiny import FAMILIES, Row


QUESTIONS = 4
BEFORE = ["q" * 40, None]


class Form:
    """FLOPs of tokens on top of others that are known, from a text configuration's numbers."""

    def __init__(self, text, layers: int, branch_layer: int, branch_depth: int):
        self.layers, self.lower, self.depth = layers, branch_layer, branch_depth
        self.hidden, self.mlp, self.vocabulary = text.hidden_size, text.intermediate_size, text.vocab_size
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or self.hidden // self.heads

    def keys(self, tokens: int) -> int:
        """Keys and values alone."""
        return 2 * 2 * tokens * self.hidden * self.kv_heads * self.head_dim

    def layer(self, queries: int, keys: int) -> int:
        own = 2 * 2 * queries * self.hidden * self.heads * self.head_dim + 3 * 2 * queries * self.hidden * self.mlp
        return own + self.keys(queries) + 2 * 2 * queries * keys * self.heads * self.head_dim

    def last(self, queries: int, keys: int) -> int:
        """A layer of which one token is read."""
        return self.layer(1, keys) - self.keys(1) + self.keys(queries)

    def scorer(self, visual: int, tokens: int) -> int:
        projections = 2 * self.hidden * self.head_dim * (2 * self.heads + visual * self.kv_heads)
        return projections + 2 * 2 * visual * self.head_dim * (self.heads + 1)

    def head(self) -> int:
        return 2 * self.hidden * self.vocabulary

    def page(self, tokens: int, *, gate: bool = True, region: bool = True) -> int:
        """Nobody reads a page's states behind the last layer, nor behind the gate's."""
        decoder = (self.layers - 1) * self.layer(tokens, tokens) + self.keys(tokens)
        decoder += gate * ((self.depth - 1) * self.layer(tokens, tokens) + self.keys(tokens))
        return decoder + region * (self.depth - 1) * self.layer(tokens, tokens)

    def gate(self, own: int, prompt: int) -> int:
        return (self.depth - 1) * self.layer(own, prompt) + self.last(own, prompt)

    def skipped(self, own: int, prompt: int) -> int:
        """A question of `own` tokens that the gate lets pass, its prompt `prompt` tokens long with the page's."""
        decoder = (self.layers - 1) * self.layer(own, prompt) + self.last(own, prompt)
        return decoder + self.gate(own, prompt) + self.head()

    def zoomed(self, own: int, prompt: int, visual: int, inserted: int) -> int:
        """A question that zooms, without its crop's vision tower; the crop stands behind the page."""
        chunk, fused = inserted + own, inserted + prompt
        first = self.lower * self.layer(own, prompt) + self.gate(own, prompt)
        region = (self.depth - 1) * self.layer(own, prompt) + self.scorer(visual, prompt)
        second = (self.layers - 1) * self.layer(chunk, fused) + self.last(chunk, fused)
        return first + region + second + self.head()


class Setting:
    """A family's model and questions of equal length about one image."""

    def __init__(self, family: str, monkeypatch):
        self.model = large_model(family)
        self.seen = Seen(self.model, monkeypatch)
        self.form = Form(self.model.config.get_text_config(), LAYERS, BRANCH_LAYER, BRANCH_DEPTH)
        rows = [Row([*BEFORE, f"what is at place {number}? " * 2], [(12, 14)], seed=1) for number in range(QUESTIONS)]
        self.batch = large_inputs(family, rows)
        self.singles = [large_inputs(family, [row]) for row in rows]
        if not FAMILY[family].has_budget:  # whose images are drawn anew for every call
            pixels, source = self.batch["pixel_values"][:1], self.batch["source_images"][0]
            self.batch |= {"pixel_values": pixels.repeat(QUESTIONS, 1, 1, 1), "source_images": [source] * QUESTIONS}
            for single in self.singles:
                single |= {"pixel_values": pixels, "source_images": [source]}
        ids = self.singles[0]["input_ids"][0]
        image = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        self.markers, self.visual, self.prompt = FAMILY[family].markers, len(image), len(ids)
        self.page = int(image[-1]) + 1 + self.markers // 2
        self.own = self.prompt - self.page
        assert self.visual > 150 and self.own >= 40


@pytest.fixture(params=FAMILIES)
def setting(request, monkeypatch):
    return Setting(request.param, monkeypatch)


def test_reading_a_page_costs_its_layers_and_branches(setting):
    counted = count_flops(lambda: setting.model.read_page(**setting.singles[0]))
    assert_close(counted, setting.seen.coarse(setting.singles[0]) + setting.form.page(setting.page))


def test_questions_that_skip_cost_what_stands_behind_the_page(setting):
    page = setting.model.read_page(**setting.singles[0])
    own = setting.form.skipped(setting.own, setting.prompt)
    for single in setting.singles:
        assert_close(generate_flops(setting.model, single, page=page, gate_threshold=1.5)[0], own)
    counted, reports = generate_flops(setting.model, setting.batch, page=page, gate_threshold=1.5)
    assert [report.reason for report in reports] == ["gate_closed"] * QUESTIONS
    assert_close(counted, QUESTIONS * own)


def test_questions_that_zoom_cost_crop_and_what_stands_behind_it(setting):
    page = setting.model.read_page(**setting.singles[0])
    for single in setting.singles:
        counted, (report,) = generate_flops(setting.model, single, page=page, gate_threshold=0, **PEAK)
        inserted = report.crop_tokens + setting.markers
        expected = setting.form.zoomed(setting.own, setting.prompt, setting.visual, inserted)
        assert report.zoomed
        assert_close(counted, expected + setting.seen.crop())


def test_one_call_reads_its_page_once_and_nothing_that_nobody_asks_for(setting):
    counted, _ = generate_flops(setting.model, setting.batch, gate_threshold=1.5)
    page = setting.seen.coarse(setting.singles[0]) + setting.form.page(setting.page, region=False)
    assert_close(counted, page + QUESTIONS * setting.form.skipped(setting.own, setting.prompt))
    counted, reports = generate_flops(setting.model, setting.batch, zoom="always", region_threshold=1.0)
    assert {report.reason for report in reports} == {"empty_map"}
    form = setting.form
    region = (BRANCH_DEPTH - 1) * form.layer(setting.own, setting.prompt) + form.scorer(setting.visual, setting.prompt)
    own = form.skipped(setting.own, setting.prompt) - form.gate(setting.own, setting.prompt) + region
    page = setting.seen.coarse(setting.singles[0]) + form.page(setting.page, gate=False)
    assert_close(counted, page + QUESTIONS * own)


def test_ten_questions_cost_a_fifth_of_ten_plain_calls():
    """The closed form above at the shapes of Qwen2.5-VL-7B: 576 visual tokens, 64 of text."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "depth": 32, "num_heads": 16}
    vlm = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    config = QZoomConfig(vlm_config=vlm, branch_layer=18, branch_depth=3, min_tokens=128, max_tokens=576)
    form, tower = Form(vlm.text_config, 28, 18, 3), VisionCost(config)((24, 24))
    prompt = 576 + 64
    plain = tower + 28 * form.layer(prompt, prompt) + form.head()
    ratios = []
    for before in (0, 16, 32):  # of the text, in front of the image
        page = 576 + before
        ratios.append((tower + form.page(page) + 10 * form.skipped(prompt - page, prompt)) / (10 * plain))
    assert max(ratios) <= 0.22, ratios


def test_the_page_is_as_large_as_it_says(setting):
    page = setting.model.read_page(**setting.singles[0])
    text = setting.model.config.get_text_config()
    layers = LAYERS + BRANCH_DEPTH + BRANCH_DEPTH - 1
    cached = 2 * layers * setting.page * setting.form.kv_heads * setting.form.head_dim
    states = 2 * setting.page * text.hidden_size + setting.visual * text.hidden_size
    levels = len(page.beginning.images.deepstack) * setting.visual * text.hidden_size
    assert abs(page.nbytes - torch.float32.itemsize * (cached + states + levels)) <= 64 * setting.page


def test_the_library_predicts_page_and_questions(setting):
    """In one call whose questions all skip; `read_page` reads the page for the region branch as well."""
    ids = setting.singles[0]["input_ids"][0]
    grid = (14, 14) if setting.visual == 196 else (12, 14)
    cost = PrefillCost(setting.model.config, ZoomOptions())
    prompt = Prompt(len(ids), setting.own, grid)
    assert prompt.prefix == setting.page and prompt.visual == setting.visual
    counted, _ = generate_flops(setting.model, setting.batch, gate_threshold=1.5)
    assert_close(counted, cost.page(prompt) + QUESTIONS * cost.question(prompt))
    read = count_flops(lambda: setting.model.read_page(**setting.singles[0]))
    region = (BRANCH_DEPTH - 1) * setting.form.layer(setting.page, setting.page)
    assert_close(read, cost.page(prompt) + region)
