"""Measures a demo checkpoint on fresh drawn pages.

Every page gets one fine question (its code is illegible in the coarse view) and one coarse question. Page seeds lie
far above those of training.
"""

import logging
from typing import Any

from .. import QZoomForConditionalGeneration, QZoomProcessor
from .metrics import area_share, auroc, exact_match, region_recall
from .synthetic import Page, Question, draw_page, page_questions


FIRST_SEED = 2 * 10**9
"""Training draws seeds below 10^9, choosing thresholds uses seeds from 10^9 on."""

logger = logging.getLogger(__name__)


def ask(
    model: QZoomForConditionalGeneration,
    processor: QZoomProcessor,
    rows: list[tuple[Page, Question]],
    batch_size: int = 25,
    budget: int | None = None,
    **options: Any,
) -> tuple[list[str], list[Any]]:
    """Answers and zoom reports of (page, question) rows.

    Args:
        budget: Coarse budget in tokens; the checkpoint's own if None.
        options: Zoom options of `generate`.
    """
    answers, reports = [], []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            for _, question in chosen
        ]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        sizes = {} if budget is None else {"max_tokens": budget, "min_tokens": budget // 2}
        inputs = processor(images=[[page.image] for page, _ in chosen], text=prompts, **sizes).to(model.device)
        if inputs["pixel_values"].dtype != model.dtype:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_zoom_reports=True, **options)
        fresh = output.sequences[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(fresh, skip_special_tokens=True)
        reports += output.zoom_reports
        logger.info("%s: %d/%d rows", options.get("zoom", "auto"), len(answers), len(rows))
    return answers, reports


def accuracy(answers: list[str], rows: list[tuple[Page, Question]], kind: str | None = None) -> float:
    """Share of exact answers, of one kind of question or of all."""
    right = [
        exact_match(answer, question.answer)
        for answer, (_, question) in zip(answers, rows, strict=True)
        if kind in (None, question.kind)
    ]
    return sum(right) / len(right)


def draw_rows(first_seed: int, pages: int) -> list[tuple[Page, Question]]:
    """Two rows per page: its fine question, then its coarse one."""
    rows = []
    for seed in range(first_seed, first_seed + pages):
        page = draw_page(seed)
        rows += [(page, question) for question in page_questions(page, seed)]
    return rows


def measure(
    model: QZoomForConditionalGeneration,
    processor: QZoomProcessor,
    first_seed: int,
    pages: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """All demo figures as fractions, except tokens.

    Args:
        options: Zoom options beside `zoom`, such as `effort`.
    """
    rows = draw_rows(first_seed, pages)
    fine = [row for row in rows if row[1].kind == "fine"]
    plain, _ = ask(model, processor, rows, zoom="never")
    always, forced = ask(model, processor, rows, zoom="always", **options)
    auto, reports = ask(model, processor, rows, zoom="auto", **options)
    plain_8x, _ = ask(model, processor, fine, batch_size=10, budget=8 * processor.max_tokens, zoom="never")

    is_fine = [question.kind == "fine" for _, question in rows]
    zoomed = [report.zoomed for report in reports]
    boxes = [report.box for report, wanted in zip(forced, is_fine, strict=True) if wanted]
    areas = [area_share(box, page.image.size) for box, (page, _) in zip(boxes, fine, strict=True) if box is not None]

    def share(values: list[bool], kind: bool) -> float:
        chosen = [value for value, wanted in zip(values, is_fine, strict=True) if wanted == kind]
        return sum(chosen) / len(chosen)

    return {
        "fine_accuracy_zoom": accuracy(always, rows, "fine"),
        "fine_accuracy_auto": accuracy(auto, rows, "fine"),
        "fine_accuracy_plain_coarse": accuracy(plain, rows, "fine"),
        "fine_accuracy_plain_8x": accuracy(plain_8x, fine),
        "coarse_accuracy_zoom": accuracy(auto, rows, "coarse"),
        "coarse_accuracy_plain": accuracy(plain, rows, "coarse"),
        "region_recall": region_recall(boxes, [question.box for _, question in fine]),
        "region_area": sum(areas) / max(1, len(areas)),
        "gate_auroc": auroc([report.gate_probability for report in reports], is_fine),
        "gating_loss": accuracy(always, rows) - accuracy(auto, rows),
        "zoomed_share_fine": share(zoomed, True),
        "zoomed_share_coarse": share(zoomed, False),
        "coarse_tokens": sum(report.coarse_tokens for report in reports) / len(reports),
        "tokens_fine": sum(r.coarse_tokens + r.crop_tokens for r in reports[::2]) / len(fine),
        "tokens_coarse": sum(r.coarse_tokens + r.crop_tokens for r in reports[1::2]) / len(fine),
    }
