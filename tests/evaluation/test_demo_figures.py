"""The figures of a model that knows nothing, from question to summary."""

import pytest

from modeling_qzoom.evaluation.demo_figures import accuracy, draw_rows, measure
from modeling_qzoom.evaluation.synthetic import question_corpus
from modeling_qzoom.training.demo_checkpoint import CROP_TOKENS, attach_branches, build_processor
from modeling_qzoom.training.demo_model import build_backbone, demo_config
from modeling_qzoom.training.tokenization import SPECIAL_TOKENS, build_tokenizer


def test_every_figure_is_a_share() -> None:
    tokenizer = build_tokenizer(question_corpus())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    model = attach_branches(build_backbone(demo_config(384, ids)))
    summary = measure(model, build_processor(tokenizer), 5, 2, {"gate_threshold": 0.0})
    assert summary["zoomed_share_fine"] == summary["zoomed_share_coarse"] == 1.0
    assert 32 <= summary["coarse_tokens"] <= 64 < summary["tokens_fine"] <= 64 + CROP_TOKENS["balanced"]
    for name, value in summary.items():
        assert "tokens" in name or -1 <= value <= 1, name


def test_rows_alternate_and_answers_are_counted_by_kind() -> None:
    rows = draw_rows(7, 3)
    assert [question.kind for _, question in rows] == ["fine", "coarse"] * 3
    answers = [question.answer if question.kind == "fine" else "" for _, question in rows]
    assert accuracy(answers, rows, "fine") == 1.0
    assert accuracy(answers, rows, "coarse") == 0.0
    assert accuracy(answers, rows) == pytest.approx(0.5)
