"""Thresholds chosen from scores made by hand."""

import pytest
import torch

from modeling_qzoom import ZoomReport
from modeling_qzoom.evaluation.synthetic import code_question, draw_page
from modeling_qzoom.training.demo_options import gate_threshold, score_region


def test_gate_threshold_lies_in_the_gap() -> None:
    assert 0.4 < gate_threshold([0.7, 0.9, 0.95], [0.1, 0.4, 0.2]) < 0.7
    # one coarse question above every fine one costs less than losing the fine ones
    assert gate_threshold([0.7, 0.8, 0.75], [0.1, 0.2, 0.99]) == pytest.approx(0.45)


def test_region_score_counts_covered_codes() -> None:
    page = draw_page(0)
    question = code_question(page, 0)
    x0, y0, x1, y1 = question.box
    width, height = page.image.size
    centre = (int((y0 + y1) / 2 / height * 8), int((x0 + x1) / 2 / width * 8))
    heatmap = torch.zeros(8, 8)
    heatmap[max(0, centre[0] - 1) : centre[0] + 2, max(0, centre[1] - 1) : centre[1] + 2] = 0.5
    hit = score_region([ZoomReport(heatmap=heatmap)], [(page, question)], "absolute", 0.3)
    assert hit.recall == 1.0 and 0 < hit.area < 0.2
    assert score_region([ZoomReport(heatmap=heatmap)], [(page, question)], "absolute", 0.6).recall == 0.0
    assert score_region([ZoomReport(heatmap=heatmap)], [(page, question)], "peak", 0.6).recall == 1.0
