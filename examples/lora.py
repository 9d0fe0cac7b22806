"""Fine-tune with LoRA, also on a base in 4 bit: python examples/lora.py [--four-bit] [--steps N]

Teaches new answers to the questions about the bundled page, over coarse view and crop as `generate` sees them. Needs
the extra `train`; for a whole data set use the stage `train-fusion` (examples/train_own_data.py).
"""

from typing import Any

import peft
import torch
import transformers
from common import OUT, PAGE, QUESTIONS, arguments, plain_backbone, positive
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig


options = arguments(
    __doc__,
    four_bit={"action": "store_true"},
    steps={"type": positive, "default": 12},
    output={"default": str(OUT / "lora-addon")},
)
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["model.visual"],
)
model = AutoModelForImageTextToText.from_pretrained(
    options.model,
    trust_remote_code=True,
    device_map="auto",
    quantization_config=nf4 if options.four_bit else None,
    base_model_name_or_path=plain_backbone(options.model),  # an add-on names its base
)
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
model.requires_grad_(False)
decoder_only = r"vlm\..*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"  # not the branches, which look alike
try:
    model.add_adapter(peft.LoraConfig(r=16, lora_alpha=32, target_modules=decoder_only))
except ValueError as error:  # each transformers asks for a peft of its time
    here = f"transformers {transformers.__version__} and peft {peft.__version__} are installed"
    raise SystemExit(f"error: {error} ({here}; a pair that goes together: pip install '.[train]')") from None


def chat(question: str, answer: str | None = None) -> list[dict]:
    content = [{"type": "image", "image": Image.open(PAGE)}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def encode(chats: list[list[dict]], **kwargs: Any) -> Any:
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", **kwargs).to(
        model.device
    )


inputs = encode([chat(question, "red") for question in QUESTIONS])
labels = inputs["input_ids"].clone()
lengths = [encode([chat(question)], add_generation_prompt=True)["input_ids"].shape[1] for question in QUESTIONS]
for row, prompt in enumerate(lengths):  # rows are padded on the left; the loss is for the answer only
    padding = int((inputs["attention_mask"][row] == 0).sum())
    labels[row, : padding + prompt] = -100

trained = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-3)
model.train()
for step in range(options.steps):
    loss = model(**inputs, labels=labels).loss  # with source images: over coarse view and crop
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1:3} loss {loss.item():.3f}")

model.eval().save_addon(options.output)  # branches and adapter; the base stays where it is
processor.save_pretrained(options.output)
loaded = AutoModelForImageTextToText.from_pretrained(options.output, trust_remote_code=True, device_map="auto")
prompt = encode([chat(QUESTIONS[0])], add_generation_prompt=True)
ids = loaded.generate(**prompt, max_new_tokens=16)
print(f"{QUESTIONS[0]} {processor.decode(ids[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True)}")
