"""The main job on the bundled checkpoint: one question the coarse view can answer, one it cannot.

    python examples/demo.py [--image FILE --question TEXT]

Builds a loadable folder from the checkpoint's data and this package, loads it as any user would, and shows what the
gate decided, where the model looked and what that cost. Exits with 1 when a bundled question is answered wrongly.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hub_release.build import build  # noqa: E402
from modeling_qzoom.processing_images_qzoom import ImageSlot, load_rgb  # noqa: E402


CHECKPOINT = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
ASSETS = ROOT / "examples" / "assets"
OWN_IMAGE_NOTE = (
    "Note: the demo model is tiny and reads only pages of its own kind (shapes with small codes, forms, dense text)."
)


def answer(model: Any, processor: Any, image: Image.Image, question: str, **options: Any) -> tuple[str, Any]:
    """The model's answer and its `ZoomReport`."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_zoom_reports=True, **options)
    new_tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new_tokens, skip_special_tokens=True).strip(), output.zoom_reports[0]


def full_resolution_tokens(image: Image.Image, token_side: int) -> int:
    """Visual tokens that the plain model needs to see every pixel of the image."""
    return max(1, round(image.height / token_side)) * max(1, round(image.width / token_side))


def show(model: Any, processor: Any, image: Image.Image, question: str, truth: str | None, picture: Path) -> bool:
    """Answers one question, prints what happened and writes the overlay; whether the answer was right."""
    text, report = answer(model, processor, image, question)
    plain, _ = answer(model, processor, image, question, zoom="never")
    vision = model.config.vision_config
    full = full_resolution_tokens(image, vision.patch_size * vision.spatial_merge_size)
    used = report.coarse_tokens + report.crop_tokens
    gate = "not run" if report.gate_probability is None else f"{report.gate_probability:.3f}"
    print(f"question           {question}")
    print(f"answer             {text}" + ("" if truth is None else f"   (truth: {truth})"))
    print(f"plain, coarse view {plain}")
    print(f"gate probability   {gate} -> {report.reason}")
    print(f"box                {report.box if report.zoomed else 'none'}")
    print(f"visual tokens      {report.coarse_tokens} coarse + {report.crop_tokens} crop = {used}")
    if used < full:
        print(f"of full resolution {used / full:.1%} ({full} tokens)")
    picture.parent.mkdir(parents=True, exist_ok=True)
    report.overlay(image).save(picture)
    print(f"overlay            {picture.relative_to(Path.cwd()) if picture.is_relative_to(Path.cwd()) else picture}\n")
    return truth is None or text == truth


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="your own image instead of the bundled page")
    parser.add_argument("--question", help="your own question")
    parser.add_argument("--output", type=Path, default=ROOT / "out", help="where overlays are written")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    bundled = json.loads((ASSETS / "page.json").read_text())
    image_path = arguments.image or ASSETS / bundled["image"]
    if not image_path.is_file():
        print(f"error: there is no image {image_path}", file=sys.stderr)
        return 1
    if arguments.question:
        questions = [{"question": arguments.question, "answer": None}]
    elif arguments.image:
        print("error: an image of your own needs a question: make demo IMAGE=… QUESTION='…'", file=sys.stderr)
        return 1
    else:
        questions = bundled["questions"]

    folder = build(CHECKPOINT, ROOT / "build" / "qzoom-demo", force=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    if arguments.image or arguments.question:
        print(OWN_IMAGE_NOTE + "\n")
    try:
        image = load_rgb(ImageSlot(str(image_path), 0), processor.max_source_pixels)
        print(f"image              {image_path.name}, {image.width} x {image.height} pixels\n")
        right = [
            show(model, processor, image, item["question"], item["answer"], arguments.output / f"overlay-{number}.png")
            for number, item in enumerate(questions, start=1)
        ]
    except OSError as error:  # of the overlays
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {image_path}: {error}", file=sys.stderr)
        return 1
    if not all(right):
        print("error: a bundled question was answered wrongly", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
