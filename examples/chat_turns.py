"""A chat with several turns about one image; every turn decides anew whether and where to look closer.

python examples/chat_turns.py [--image FILE] [--questions TEXT TEXT ...]
"""

from typing import Any

from common import PAGE, QUESTIONS, arguments, file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


options = arguments(__doc__, image={"type": file, "default": PAGE}, questions={"default": QUESTIONS, "nargs": "+"})
model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)

chat: list[dict[str, Any]] = []
for question in options.questions:
    text = {"type": "text", "text": question}
    image = {"type": "image", "image": Image.open(options.image)}
    chat.append({"role": "user", "content": [text] if chat else [image, text]})  # the image stands in the first turn
    # the whole chat each time: a zoom changes what is in the cache, so that of an earlier turn cannot be continued
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=16, return_zoom_reports=True)
    answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    report = output.zoom_reports[0]
    print(f"{question:40} {answer:12} {report.reason} {report.box or ''}")
