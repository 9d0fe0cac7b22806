"""The pages that the demo and the README show: `python hub_release/demo/pictures.py`.

Takes the first test pages on which the demo checkpoint answers one coarse and one fine question rightly, and says so:
they are illustrations, not measurements.
"""

import argparse
import json
import random
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor  # noqa: E402
from modeling_qzoom.asking.answers import ask  # noqa: E402
from modeling_qzoom.asking.metrics import covered_share  # noqa: E402
from modeling_qzoom.data.drawn.pages import Page, Question  # noqa: E402
from modeling_qzoom.data.drawn.questions import ask_question, draw_page  # noqa: E402


ASSETS = ROOT / "examples" / "assets"
PICTURES = {"scene": ("page", "overlay"), "form": ("form", "overlay-form")}
"""Per kind of page the names of the page and of the overlay."""
SPLIT = "test"


def questions_of(page: Page, seed: int) -> list[Question]:
    """A coarse and a fine question, a function of the seed; of all wordings one that is a question."""
    rng = random.Random(f"picture/{seed}")
    found = []
    for kind in ("coarse", "fine"):
        question = ask_question(page, kind, rng)
        while not question.text.endswith("?"):
            question = ask_question(page, kind, rng)
        found.append(question)
    return found


def is_shown(model: QZoomForConditionalGeneration, processor: QZoomProcessor, page: Page, asked: list[Question]):
    """The report of the fine question if both answers are right and only the fine one zooms, onto its place."""
    rows = [(page.image, question.text) for question in asked]
    coarse, fine = list(ask(model, processor, rows))
    if (coarse.text, fine.text) != (asked[0].answer, asked[1].answer) or coarse.report.zoomed:
        return None
    return fine.report if fine.report.zoomed and covered_share(fine.report.box, asked[1].box) == 1 else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "hub_release" / "checkpoints" / "qzoom-demo")
    model_folder = parser.parse_args().model
    # float32, as examples/demo.py runs it
    model = QZoomForConditionalGeneration.from_pretrained(model_folder, dtype="float32").eval()
    processor = QZoomProcessor.from_pretrained(model_folder)
    for kind, (name, overlay) in PICTURES.items():
        for seed in range(200):
            page = draw_page(seed, kind=kind, split=SPLIT)
            asked = questions_of(page, seed)
            report = is_shown(model, processor, page, asked)
            if report is not None and len(page.entries) > 3:
                break
        else:
            raise SystemExit(f"error: of 200 pages of kind {kind} none is answered rightly")
        page.image.save(ASSETS / f"{name}.png", optimize=True)
        report.overlay(page.image).save(ASSETS / f"{overlay}.png", optimize=True)
        facts = {
            "image": f"{name}.png",
            "kind": kind,
            "seed": seed,
            "split": SPLIT,
            "size": list(page.image.size),
            "questions": [{"question": q.text, "answer": q.answer, "kind": q.kind, "box": list(q.box)} for q in asked],
        }
        (ASSETS / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(f"{name}.png: seed {seed}, {[f'{q.text} {q.answer}' for q in asked]}")


if __name__ == "__main__":
    main()
