"""The closed form of a prefill under options: what each option changes, and the table of issue 11."""

from dataclasses import replace
from typing import Any

import pytest

from hub_release.measure.sizes import BACKBONES
from modeling_qzoom import QZoomConfig, ZoomCost, zoom_cost
from modeling_qzoom.cost_qzoom import PrefillCost, Prompt
from modeling_qzoom.zoom_options_qzoom import resolve_options
from tests.tiny import FAMILIES, FAMILY, vlm_config


IMAGE = (3000, 3000)  # a square, larger than any budget
EXACT: dict[str, Any] = {"gate_branch": "full", "region_branch": "full", "keep_share": 1.0, "skip_unread": True}
UNTRAINED = {**EXACT, "gate_branch": "light", "keep_share": 0.1}
TRAINED = {**UNTRAINED, "region_branch": "light"}
COARSE = Prompt(tokens=100, suffix=30, grid=(8, 8))


def config_of(name: str) -> QZoomConfig:
    return BACKBONES[name].config(zooms=True)[0]


def at(tokens: int, crop: int, options: dict[str, Any], name: str = "qwen2.5-vl-7b") -> ZoomCost:
    return zoom_cost(config_of(name), IMAGE, max_tokens=tokens, crop_tokens=crop, **options)


def cost_of(family: str, **options: Any) -> PrefillCost:
    config = QZoomConfig(vlm_config=vlm_config(family), branch_layer=3, branch_depth=2, **FAMILY[family].budget())
    return PrefillCost(config, resolve_options(options, (), config, mrope=config.backbone.mrope))


@pytest.mark.parametrize("tokens", [576, 1024, 2048, 4096])
@pytest.mark.parametrize(("options", "most"), [(EXACT, 1.03), (UNTRAINED, 0.985), (TRAINED, 0.985)])
def test_what_a_skipped_row_may_cost(tokens, options, most):
    assert at(tokens, 256, options).skip_over_plain <= most


@pytest.mark.parametrize(
    ("tokens", "crop", "options", "most"),
    [
        (576, 256, EXACT, 1.54),
        (576, 256, UNTRAINED, 1.30),
        (576, 256, TRAINED, 1.25),
        (1024, 256, EXACT, 1.35),
        (1024, 256, UNTRAINED, 1.10),
        (1024, 256, TRAINED, 1.05),
        (4096, 384, EXACT, 1.17),
        (4096, 384, UNTRAINED, 0.92),
        (4096, 384, TRAINED, 0.87),
    ],
)
def test_what_a_zoomed_row_may_cost(tokens, crop, options, most):
    assert at(tokens, crop, options).zoom_over_plain <= most


@pytest.mark.parametrize(("options", "least"), [(EXACT, 4.9), (UNTRAINED, 5.8), (TRAINED, 6.0)])
def test_a_large_plain_view_costs_as_many_zoomed_rows(options, least):
    assert at(4096, 256, options).plain.flops >= least * at(576, 256, options).zoomed.flops


def test_ten_questions_about_one_page():
    assert at(576, 256, UNTRAINED).page_over_plain(10) <= 0.22
    assert at(576, 256, EXACT).page_over_plain(10) <= 0.22
    once = at(576, 256, EXACT)
    assert once.page_over_plain(1) == pytest.approx(once.skip_over_plain, abs=0.005)


def test_before_any_saving():
    """The column "today" of the table."""
    today = {**EXACT, "skip_unread": False}
    for tokens, crop, skipped, zoomed in ((576, 256, 1.08, 1.59), (1024, 256, 1.08, 1.40), (4096, 384, 1.08, 1.22)):
        cost = at(tokens, crop, today)
        assert cost.skip_over_plain == pytest.approx(skipped, abs=0.01)
        assert cost.zoom_over_plain == pytest.approx(zoomed, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_saving_saves(family):
    full = cost_of(family, skip_unread=False)
    assert cost_of(family).skipped(COARSE) < full.skipped(COARSE)
    assert cost_of(family, gate_branch="light").gate(COARSE) < cost_of(family).gate(COARSE)
    assert cost_of(family, region_branch="light").region(COARSE) < cost_of(family).region(COARSE)
    costs = [cost_of(family, keep_share=share).zoomed(COARSE, (4, 4)) for share in (0.0, 0.1, 0.5, 1.0)]
    assert costs == sorted(set(costs))
    assert cost_of(family, keep_share=0.1).kept(64) == 7
    assert {cost_of(family, **options).plain(COARSE) for options in (EXACT, UNTRAINED, TRAINED)} == {
        full.plain(COARSE)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", ["full", "light"])
def test_a_page_and_its_question_are_a_skipped_row(family, gate):
    """Only what the last layers leave out differs: a page stops at keys and values, wherever the row may end."""
    cost = cost_of(family, gate_branch=gate)
    once, alone = cost.page(COARSE) + cost.question(COARSE), cost.skipped(COARSE)
    assert 0.9 * alone < once <= alone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_ends_in_its_image(family):
    """The last visual token asks, so a light branch updates it."""
    ends = replace(COARSE, tokens=70 + FAMILY[family].markers // 2, suffix=0)
    light, full = cost_of(family, gate_branch="light"), cost_of(family)
    assert 0 < light.gate(ends) < full.gate(ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crop_in_place_of_a_large_image_pays_off(family):
    """The point of zooming: a coarse view and a crop cost less than the same page at eight times the budget."""
    cost = cost_of(family, skip_unread=False)
    large = replace(COARSE, tokens=100 + 7 * 64, grid=(16, 32))
    zoomed = cost.zoomed(COARSE, (8, 8))
    assert cost.plain(COARSE) < cost.skipped(COARSE) < zoomed < cost.plain(large)
    assert zoomed - cost.zoomed(COARSE, (8, 8), gate=False) == cost.gate(COARSE)
