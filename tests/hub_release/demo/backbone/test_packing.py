"""Packed sequences equal what the stock model computes for each question alone."""

import random

import numpy as np
import torch

from hub_release.demo.backbone.fast_tower import fast_tower
from hub_release.demo.backbone.packing import Packer, Sample, Segment, answer_loss, embed
from hub_release.demo.backbone.view_batch import encode
from hub_release.demo.backbone.views import View, cell_crop, normalise, whole_view
from hub_release.demo.checkpoint import attach_branches
from modeling_qzoom.data.drawn.questions import coarse_questions, code_question, draw_page
from modeling_qzoom.training_losses_qzoom import IGNORED


def pixel_inputs(view: View) -> dict[str, torch.Tensor]:
    """What the stock model takes for a view: two temporal copies of every patch."""
    values = normalise(view.patches).view(-1, 3, 1, 196).expand(-1, 3, 2, -1).reshape(len(view.patches), -1)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 2 * view.grid[0], 2 * view.grid[1]]])}


def prompt_ids(view: View, text: str, tokenizer) -> torch.Tensor:
    pads = "<|image_pad|>" * (view.grid[0] * view.grid[1])
    head = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(head, return_tensors="pt").input_ids


def test_packed_plain_questions_equal_the_stock_model(tokenizer, backbone) -> None:
    model = backbone
    page = draw_page(1)
    view = whole_view(page, 64)
    questions = [code_question(page, 0, random.Random(0)), coarse_questions(page)[0]]
    batch = Packer(tokenizer)([Sample(view, [Segment(question) for question in questions])])
    with torch.no_grad(), fast_tower(model.model.visual):
        tokens, _ = encode(model.model.visual, batch.views)
        packed = model.model.language_model(
            inputs_embeds=embed(model, batch, tokens),
            position_ids=batch.positions,
            attention_mask={"full_attention": batch.mask},
            use_cache=False,
        ).last_hidden_state
    for number, question in enumerate(questions, start=1):
        answer = tokenizer(question.answer, return_tensors="pt").input_ids
        ids = torch.cat([prompt_ids(view, question.text, tokenizer), answer], dim=1)
        with torch.no_grad():
            alone = model.model(
                input_ids=ids,
                **pixel_inputs(view),
                mm_token_type_ids=(ids == model.config.image_token_id).long(),
            ).last_hidden_state
        mine = packed[0][(batch.segment[0] == number) & (batch.labels[0] != IGNORED)]
        torch.testing.assert_close(mine, alone[0, -len(mine) :], atol=1e-4, rtol=1e-4)


def test_crop_positions_follow_the_documented_rule(tokenizer) -> None:
    page = draw_page(2)
    view = whole_view(page, 64)
    crop, cells = cell_crop(page, page.entries[0].code_box, view.grid, 36, random.Random(0))
    question = code_question(page, 0, random.Random(0))
    batch = Packer(tokenizer)([Sample(view, [Segment(question, crop, cells), Segment(question, crop, None)])])
    place = batch.positions[:, 0]
    pads = (batch.input_ids[0] == Packer(tokenizer).pad).nonzero().flatten()
    crop_tokens = crop.grid[0] * crop.grid[1]
    page_tokens = view.grid[0] * view.grid[1]
    start = int(place[0, pads[0]])
    end = start + max(view.grid)
    inner = place[:, pads[page_tokens : page_tokens + crop_tokens]]
    assert place[0, pads[page_tokens] - 1] == end + 1
    assert (inner[0] == end + 2).all()
    assert inner[1].min() == start + cells[1] and inner[1].max() == start + cells[3] - 1
    assert inner[2].min() == start + cells[0] and inner[2].max() == start + cells[2] - 1
    assert place[0, pads[page_tokens + crop_tokens - 1] + 1] == end + max(crop.grid) + 2
    second = place[:, pads[page_tokens + crop_tokens :]]
    assert (second[0] == end + 2).all()
    assert second[1].tolist()[:: crop.grid[1]] == [end + 2 + row for row in range(crop.grid[0])]
    assert second[2].tolist()[: crop.grid[1]] == [end + 2 + column for column in range(crop.grid[1])]


def test_packed_crops_train_what_forward_trains(tokenizer, backbone) -> None:
    vlm = backbone
    page = draw_page(3)
    view = whole_view(page, 64)
    crop, cells = cell_crop(page, page.entries[0].code_box, view.grid, 36, random.Random(1))
    question = code_question(page, 0, random.Random(0))
    batch = Packer(tokenizer)([Sample(view, [Segment(question, crop, cells)])])
    with torch.no_grad(), fast_tower(vlm.model.visual):
        packed, _ = answer_loss(vlm, batch, encode(vlm.model.visual, batch.views)[0])
        alone = Packer(tokenizer)([Sample(view, [Segment(question)])])
        plain, _ = answer_loss(vlm, alone, encode(vlm.model.visual, alone.views)[0])
    model = attach_branches(vlm, crop_max_tokens=36)
    prompt = prompt_ids(view, question.text, tokenizer)
    answer = torch.tensor([[*tokenizer.encode(question.answer), tokenizer.eos_token_id]])
    ids = torch.cat([prompt, answer], dim=1)
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **pixel_inputs(view),
            mm_token_type_ids=(ids == vlm.config.image_token_id).long(),
            labels=torch.cat([torch.full_like(prompt, IGNORED), answer], dim=1),
            source_images=[torch.from_numpy(np.array(page.image)).permute(2, 0, 1)],
            zoom_boxes=[tuple(int(edge) for edge in crop.box)],
        )
    # crops are resized on the device, within one grey level of PIL
    assert abs(output.loss - packed) < 0.02 * abs(packed)
    assert abs(output.loss - packed) < 0.25 * abs(plain - packed)
