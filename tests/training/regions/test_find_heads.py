"""Scores of attention heads on maps made by hand, and the stage on tiny models."""

import random

import pytest
import torch
import yaml

from modeling_qzoom.data.drawn.questions import draw_page, fine_question
from modeling_qzoom.training.regions.config import FindHeadsConfig, LabelRegionsConfig
from modeling_qzoom.training.regions.find_heads import choose_heads, run
from modeling_qzoom.training.regions.head_scores import HeadScores, ask_pages, page_scores
from modeling_qzoom.training.regions.label import with_heads
from modeling_qzoom.training.regions.rule import covered_cells
from modeling_qzoom.zoom_regions_qzoom import pixels_to_cells
from tests.tiny import FAMILIES
from tests.training.stage_fixtures import budget, write_model


GRID = (20, 20)


def _page():
    page = draw_page(5, kind="form")
    rng = random.Random(0)
    questions = [fine_question(page, rng) for _ in range(40)]
    first = questions[0]
    second = next(question for question in questions if question.items != first.items)
    return page, [first, second]


def _inside(page, box) -> torch.Tensor:
    width, height = page.image.size
    return covered_cells(pixels_to_cells(box, GRID, (height, width)), GRID)


def _free_cell(page) -> tuple[int, int]:
    """A cell far from all entries."""
    width, height = page.image.size
    busy = sum(
        covered_cells((x0 - 2, y0 - 2, x1 + 2, y1 + 2), GRID)
        for x0, y0, x1, y1 in (pixels_to_cells(entry.box, GRID, (height, width)) for entry in page.entries)
    )
    return tuple((busy == 0).nonzero()[0].tolist())


def test_scores_tell_looking_from_sinking() -> None:
    page, questions = _page()
    sink = _free_cell(page)
    maps = []
    for number, question in enumerate(questions):
        attention = torch.zeros(4, *GRID)
        attention[0] = _inside(page, question.box) * 0.01  # looks, though faintly
        attention[1][sink] = 0.5  # one cell whatever is asked
        attention[2].view(-1)[[0, 399][number]] = 0.5  # another cell each time
        attention[3] = 1 / 400
        maps.append(attention)
    grounding, sinks = page_scores(maps, page, questions, None)
    assert grounding.shape == (2, 4) and sinks.shape == (4,)
    assert grounding[:, 0].min() > 0.95
    assert grounding[:, 1].max() == 0 and grounding[:, 3].max() < 0.1
    torch.testing.assert_close(sinks[1], torch.tensor(1.0))
    assert sinks[0] == sinks[2] == 0 and sinks[3] < 0.01


def test_cells_of_entries_are_no_sinks() -> None:
    page, questions = _page()
    everywhere = torch.stack([_inside(page, page.entries[0].box)])
    assert page_scores([everywhere, everywhere], page, questions, None)[1].max() == 0


def _scores(grounding, sink, peak=0.1) -> HeadScores:
    grounding, sink = torch.tensor(grounding), torch.tensor(sink)
    peak = torch.full_like(grounding, peak) if isinstance(peak, float) else torch.tensor(peak)
    return HeadScores(grounding, sink, peak, 1.0, 10)


def test_the_best_heads_are_chosen() -> None:
    scores = _scores([[0.1, 0.9], [0.8, 0.3]], [[0.7, 0.9], [0.2, 0.4]])
    config = FindHeadsConfig(grounding_count=2, sink_count=2, sink_share=0.5)
    assert choose_heads(scores, config) == ({0: [1], 1: [0]}, {0: [0]})
    config = FindHeadsConfig(grounding_count=1, sink_count=1, sink_share=0.3)
    assert choose_heads(scores, config) == ({0: [1]}, {0: [0]})
    assert choose_heads(scores, FindHeadsConfig(sink_count=0))[1] == {}


def test_heads_too_faint_to_label_come_last() -> None:
    scores = _scores([[0.1, 0.9], [0.8, 0.3]], [[0.0, 0.0], [0.0, 0.0]], [[0.1, 0.001], [0.1, 0.1]])
    assert choose_heads(scores, FindHeadsConfig(grounding_count=2))[0] == {1: [0, 1]}
    assert choose_heads(scores, FindHeadsConfig(grounding_count=4))[0] == {0: [0, 1], 1: [0, 1]}


def test_pages_have_different_questions_about_details() -> None:
    drawn = list(ask_pages(FindHeadsConfig(pages=4)))
    assert [page.kind for page, _ in drawn] == ["scene", "form", "text", "scene"]
    for _, questions in drawn:
        assert all(question.kind == "fine" for question in questions)
        assert len({question.items for question in questions}) == len(questions) <= 2
    others = [questions[0].text for _, questions in ask_pages(FindHeadsConfig(pages=4, seed=1))]
    assert [questions[0].text for _, questions in drawn] != others


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stage_writes_what_label_regions_reads(family, tmp_path) -> None:
    model = write_model(tmp_path / "model", family)
    options = {"model": model, "pages": 3, "batch_size": 2, "max_new_tokens": 4, "sink_share": 0.0, **budget(family)}
    run(FindHeadsConfig(output=str(tmp_path / "heads.yaml"), query_tokens="before", **options))
    found = yaml.safe_load((tmp_path / "heads.yaml").read_text())
    assert sum(map(len, found["grounding_heads"].values())) == 4 and sum(map(len, found["sink_heads"].values())) == 2
    assert max(found["grounding_heads"]) < 5 and len(found["scores"]["grounding"]) == 5
    assert all(0 <= score <= 1 for row in found["scores"]["grounding"].values() for score in row)
    config = with_heads(LabelRegionsConfig(heads=str(tmp_path / "heads.yaml")), found["backbone"])
    assert config.grounding_heads == found["grounding_heads"] and config.query_tokens == "before"
    run(FindHeadsConfig(output=str(tmp_path / "again" / "heads.yaml"), query_tokens="before", **options))
    assert (tmp_path / "again" / "heads.yaml").read_text() == (tmp_path / "heads.yaml").read_text()


def test_a_model_that_answers_nothing_is_an_error(tmp_path) -> None:
    options = {"pages": 1, "max_new_tokens": 1, **budget("qwen2_5_vl")}
    with pytest.raises(ValueError, match="answers none of 2 questions"):
        run(FindHeadsConfig(model=write_model(tmp_path, "qwen2_5_vl"), output=str(tmp_path / "heads.yaml"), **options))
    assert not (tmp_path / "heads.yaml").exists()


@pytest.mark.parametrize("wrong", [{"pages": 0}, {"batch_size": 0}, {"grounding_count": 0}, {"query_tokens": "all"}])
def test_options_out_of_range_are_refused_before_a_model_is_loaded(wrong, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        run(FindHeadsConfig(model="nowhere", output=str(tmp_path / "heads.yaml"), **wrong))
