"""Ten questions about one page, which is read once: every question runs its own few tokens, and its crop if it zooms.

python examples/one_page_many_questions.py [--image FILE] [--questions TEXT TEXT ...]
"""

from typing import Any

from common import PAGE, QUESTIONS, arguments, file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


SHAPES = {"orange": "diamond", "purple": "circle", "yellow": "square"}
MORE = [f"which number is on the {color} {shape}?" for color, shape in SHAPES.items()]
MORE += [f"what color is the {shape}?" for shape in ("triangle", "star", *SHAPES.values())]

options = arguments(
    __doc__, image={"type": file, "default": PAGE}, questions={"default": [*QUESTIONS, *MORE], "nargs": "+"}
)
model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
image = Image.open(options.image)


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def encode(chats: list) -> Any:
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)


page = model.read_page(**encode(chat("")))  # up to the end of the image; what stands behind it does not count
answers, prompts = [], 0
for question in options.questions:
    inputs = encode(chat(question))
    output = model.generate(**inputs, page=page, max_new_tokens=16, return_zoom_reports=True)
    length = inputs["input_ids"].shape[1]
    answers.append(processor.decode(output.sequences[0, length:], skip_special_tokens=True))
    print(f"{question:40} {answers[-1]:12} {output.zoom_reports[0].reason}")
    prompts += length

run = page.tokens + prompts - page.tokens * len(answers)
print(f"{run} prompt tokens instead of {prompts} ({run / prompts:.2f}), the vision tower saw the image once; {page}")

# in one call, rows that begin with the same tokens and the same image find that out by themselves
inputs = encode([chat(question) for question in options.questions])
sequences = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
print(f"the same answers from one call: {processor.batch_decode(sequences, skip_special_tokens=True) == answers}")
