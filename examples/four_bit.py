"""Load in 4 or 8 bit, ask, save what was quantized, and load that: python examples/four_bit.py [--kind int8]"""

import logging
from typing import Any

import torch
from common import FINE, OUT, PAGE, arguments
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig


# The vision tower stays in 16 bit (LLaVA: "model.vision_tower", "model.multi_modal_projector"); lm_head, the gate's
# head and the region scorer do so by themselves.
kept = ["model.visual"]
RECIPES = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    ),
    "double": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept),
}
options = arguments(__doc__, kind={"choices": RECIPES, "default": "nf4"}, output={"default": str(OUT / "quantized")})
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 says at every product that it casts to float16


def ask(model: Any, processor: Any) -> str:
    content = [{"type": "image", "image": Image.open(PAGE)}, {"type": "text", "text": FINE}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=16)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(
    options.model, trust_remote_code=True, quantization_config=RECIPES[options.kind], device_map="auto"
)
print(f"{options.kind}: {model.get_memory_footprint() / 2**20:.2f} MiB of weights, {FINE} {ask(model, processor)}")

model.save_pretrained(options.output)
processor.save_pretrained(options.output)
# what is saved is quantized already, so nobody names a recipe again
reloaded = AutoModelForImageTextToText.from_pretrained(options.output, trust_remote_code=True, device_map="auto")
print(f"reloaded from {options.output}: {ask(reloaded, processor)}")
