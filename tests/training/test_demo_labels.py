"""Labels come from what the model itself answers and looks at."""

import random

import torch

from modeling_qzoom.evaluation.synthetic import coarse_questions, code_question, draw_page
from modeling_qzoom.training.branches import BranchRow, prompt_inputs
from modeling_qzoom.training.demo_labels import answer_greedily, choose_heads, draw_samples, gate_rows, region_rows
from modeling_qzoom.training.packing import Packer, Sample, Segment
from modeling_qzoom.training.region_labels import TriStateRule
from modeling_qzoom.training.tower import encode
from modeling_qzoom.training.views import IGNORE, whole_view


def test_greedy_answers_equal_generate(tokenizer, backbone) -> None:
    page = draw_page(4)
    view = whole_view(page, 64)
    questions = [code_question(page, 0), coarse_questions(page)[0], code_question(page, 1)]
    batch = Packer(tokenizer)([Sample(view, [Segment(question) for question in questions])])
    predicted = answer_greedily(backbone, batch, encode(backbone.model.visual, batch.views)[0].detach())
    for number, question in enumerate(questions, start=1):
        inputs = prompt_inputs([BranchRow(view, question)], tokenizer)
        places = (batch.segment[0] == number) & (batch.labels[0] != IGNORE)
        count = int(places.sum())
        whole = backbone.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        assert predicted[0][places].tolist()[:-1] == whole[0, inputs["input_ids"].shape[1] :].tolist()[:-1]


def test_region_rows_lie_on_the_coarse_grid(tokenizer, backbone) -> None:
    packer = Packer(tokenizer)
    heads = choose_heads(backbone, packer, 64, count=2, pages=2)
    assert len(set(heads)) == 2
    # an untrained model looks everywhere: allow any box, so that there are labels to look at
    rule = TriStateRule(largest_box=2.0, faintest_peak=0.0)
    rows = region_rows(backbone, packer, heads, pages=2, tokens=100, rule=rule)
    assert rows
    for row in rows:
        assert row.region.shape == row.view.grid
        assert row.view.grid[0] * row.view.grid[1] <= 64
        assert set(row.region.unique().tolist()) <= {1, 0, -100}
    assert backbone.model.language_model.config._attn_implementation == "sdpa"


def test_pages_of_a_seed_are_the_same() -> None:
    first, second = (draw_samples(random.Random(5), 2, 64) for _ in range(2))
    assert [page.items for page in first[0]] == [page.items for page in second[0]]
    assert torch.equal(first[1][0].view.patches, second[1][0].view.patches)


def test_gate_labels_follow_the_answers(tokenizer, backbone, monkeypatch) -> None:
    def only_crops_help(model, batch, image_tokens):
        """Segments with an even number carry a crop; the fine question's (1, 2) and the coarse one's (3, 4)."""
        right = (batch.segment == 2) | (batch.segment >= 3)
        return torch.where(right, batch.labels, torch.full_like(batch.labels, 0))

    monkeypatch.setattr("modeling_qzoom.training.demo_labels.answer_greedily", only_crops_help)
    rows = gate_rows(backbone, Packer(tokenizer), pages=16, crop_tokens=36)
    assert len(rows) == 32
    assert all(row.gate == (row.question.kind == "fine") for row in rows)
