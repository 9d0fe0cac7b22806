"""See where it looked, as a picture and in text: python examples/overlay.py [--image FILE --question TEXT]"""

from pathlib import Path
from typing import Any

from common import FINE, OUT, PAGE, arguments, file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


options = arguments(
    __doc__, image={"type": file, "default": PAGE}, question={"default": FINE}, output={"type": Path, "default": OUT}
)
model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)

image = Image.open(options.image)
content = [{"type": "image", "image": image}, {"type": "text", "text": options.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
options.output.mkdir(parents=True, exist_ok=True)
cases: dict[str, dict[str, Any]] = {
    "zoomed": {"zoom": "always"},
    "skipped": {"gate_threshold": 2},  # above every probability: the gate stays closed
    "empty": {"zoom": "always", "region_threshold": 1.0, "region_threshold_mode": "absolute"},  # no cell is that hot
}
for name, zoom_options in cases.items():
    output = model.generate(**inputs, **zoom_options, max_new_tokens=16, return_zoom_reports=True)
    report = output.zoom_reports[0]
    picture = report.overlay(image)  # a PIL image: as the last line of a notebook's cell it shows itself
    picture.save(options.output / f"overlay-{name}.png")
    print(f"--- {options.output / f'overlay-{name}.png'}, {picture.width} x {picture.height} pixels")
    print(report)  # the same in text; in a notebook a report shows its heat map
