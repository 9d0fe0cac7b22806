"""Draws the pages that the demo and the README show: `python -m hub_release.demo.pictures`.

Takes the first test pages on which the demo checkpoint answers one coarse and one fine question rightly, and says so:
they are illustrations, not measurements.
"""

import argparse
import json
import random
from pathlib import Path

from hub_release.repository.files import ROOT
from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor, ZoomReport
from modeling_qzoom.asking.answers import ask
from modeling_qzoom.asking.config import ModelConfig
from modeling_qzoom.asking.metrics import covered_share
from modeling_qzoom.asking.session import Session
from modeling_qzoom.data.drawn.pages import Page, Question
from modeling_qzoom.data.drawn.questions import ask_question, draw_page


ASSETS = ROOT / "examples" / "assets"
# by kind of page the names of the page and of the overlay
PICTURES = {"scene": ("page", "overlay"), "form": ("form", "overlay-form")}
SPLIT = "test"


def questions_of(page: Page, seed: int) -> list[Question]:
    """A coarse and a fine question, a function of the seed; of all wordings one that is a question."""
    rng = random.Random(f"picture/{seed}")
    questions = []
    for kind in ("coarse", "fine"):
        question = ask_question(page, kind, rng)
        while not question.text.endswith("?"):
            question = ask_question(page, kind, rng)
        questions.append(question)
    return questions


def fine_report(
    model: QZoomForConditionalGeneration, processor: QZoomProcessor, page: Page, questions: list[Question]
) -> ZoomReport | None:
    """The report of the fine question, if both answers are right and only the fine one zooms, onto its place."""
    session = Session(model, processor, ModelConfig(max_new_tokens=16))
    coarse, fine = list(ask(session, [(page.image, question.text) for question in questions]))
    if [coarse.text, fine.text] != [question.answer for question in questions] or coarse.report.zoomed:
        return None
    box = fine.report.box
    return fine.report if box is not None and covered_share(box, questions[1].box) == 1 else None


def illustration(
    model: QZoomForConditionalGeneration, processor: QZoomProcessor, kind: str
) -> tuple[int, Page, list[Question], ZoomReport]:
    """Seed, page, questions and report of the first test page of a kind that shows what the demo can do.

    Raises:
        SystemExit: there is none among the first 200 pages.
    """
    for seed in range(200):
        page = draw_page(seed, kind=kind, split=SPLIT)
        questions = questions_of(page, seed)
        report = fine_report(model, processor, page, questions)
        if report is not None and len(page.entries) > 3:
            return seed, page, questions, report
    raise SystemExit(f"error: of 200 pages of kind {kind} none is answered rightly")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "hub_release" / "checkpoints" / "qzoom-demo")
    model_folder = parser.parse_args().model
    # float32, as examples/demo.py runs it
    model = QZoomForConditionalGeneration.from_pretrained(model_folder, dtype="float32").eval()
    processor = QZoomProcessor.from_pretrained(model_folder)
    for kind, (name, overlay) in PICTURES.items():
        seed, page, questions, report = illustration(model, processor, kind)
        page.image.save(ASSETS / f"{name}.png", optimize=True)
        report.overlay(page.image).save(ASSETS / f"{overlay}.png", optimize=True)
        facts = {
            "image": f"{name}.png",
            "kind": kind,
            "seed": seed,
            "split": SPLIT,
            "size": list(page.image.size),
            "questions": [
                {"question": q.text, "answer": q.answer, "kind": q.kind, "box": list(q.box)} for q in questions
            ],
        }
        (ASSETS / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(f"{name}.png: seed {seed}, {[f'{q.text} {q.answer}' for q in questions]}")


if __name__ == "__main__":
    main()
