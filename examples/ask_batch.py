"""Several questions in one call; rows that zoom, rows that do not and a row without an image may be mixed.

python examples/ask_batch.py [--image FILE]
"""

from common import PAGE, QUESTIONS, arguments, file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


options = arguments(__doc__, image={"type": file, "default": PAGE})
model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)

image = Image.open(options.image)
left_half = image.crop((0, 0, image.width // 2, image.height))  # rows may differ in size
requests = [(image, question) for question in QUESTIONS] + [(left_half, QUESTIONS[0]), (None, "hello?")]
chats = []
for picture, question in requests:
    content = [] if picture is None else [{"type": "image", "image": picture}]
    chats.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])

inputs = processor.apply_chat_template(
    chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)  # padded on the left
output = model.generate(**inputs, max_new_tokens=16, return_zoom_reports=True)
answers = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

for (_, question), answer, report in zip(requests, answers, output.zoom_reports):
    tokens = f"{report.coarse_tokens} + {report.crop_tokens} visual tokens"
    print(f"{question:40} {answer:12} {report.reason:12} {tokens}")
