"""One question about one image: python examples/ask.py [--image FILE --question TEXT]"""

from common import FINE, PAGE, arguments, file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


options = arguments(__doc__, image={"type": file, "default": PAGE}, question={"default": FINE})
model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)

content = [{"type": "image", "image": Image.open(options.image)}, {"type": "text", "text": options.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=16, return_zoom_reports=True)
answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

print(f"{options.question} {answer}")
print(output.zoom_reports[0])  # what the gate said, and where the model looked
