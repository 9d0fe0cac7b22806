"""Ten questions about one page: the page is read once, each question runs what is its own, and that is counted."""

import pytest
import torch

from modeling_qzoom.measuring.hollow import counted_flops, hollow_model
from modeling_qzoom.measuring.questions import crop_options, question_inputs
from tests.measuring.test_rows import TEXT, setting_of
from tests.tiny import FAMILIES


QUESTIONS = 10


@pytest.mark.parametrize("gate", ["full", "light"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_about_one_page_cost_the_closed_form(family, gate):
    """Rows of one batch that begin alike; a page read ahead also knows what only zooming rows ask for."""
    setting = setting_of(family, gate_branch=gate)
    cost, model = setting.cost(), hollow_model(setting.config)
    inputs = question_inputs(
        setting.config.vlm_config, cost.coarse_grid, cost.crop_grid, rows=QUESTIONS, text_tokens=TEXT
    )
    visual = inputs["input_ids"][0] == setting.config.image_token_id
    end = int(visual.nonzero()[-1, 0]) + 1
    inputs["input_ids"][:, :end] = inputs["input_ids"][0, :end]
    pixels = inputs["pixel_values"]
    inputs["pixel_values"] = torch.cat([pixels[: len(pixels) // QUESTIONS]] * QUESTIONS)
    inputs["source_images"] = [inputs["source_images"][0]] * QUESTIONS
    options = {**crop_options(setting.config.vlm_config, cost.crop_grid), "gate_branch": gate, "gate_threshold": 1.5}
    counted, _ = counted_flops(lambda: model.generate(**inputs, **options, max_new_tokens=1))
    needed = cost.page_flops + QUESTIONS * cost.question_flops
    assert counted <= 1.02 * needed
