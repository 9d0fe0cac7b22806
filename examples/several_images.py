"""One question about several images; the report says which of them was looked at closely.

python examples/several_images.py [--images FILE FILE ...] [--question TEXT]
"""

from common import FINE, PAGE, arguments, file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


options = arguments(__doc__, images={"type": file, "nargs": "+"}, question={"default": FINE})
model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)

images: list[Image.Image]
if options.images:
    images = [Image.open(name) for name in options.images]
else:  # the two halves of the page
    page = Image.open(PAGE)
    middle = page.width // 2
    images = [page.crop((0, 0, middle, page.height)), page.crop((middle, 0, page.width, page.height))]
content = [{"type": "image", "image": image} for image in images]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [*content, {"type": "text", "text": options.question}]}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=16, zoom="always", return_zoom_reports=True)
answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

report = output.zoom_reports[0]
print(f"{options.question} {answer}")
print(f"looked at image {report.image_index} of {len(images)}, {report.box}: {report.reason}")
