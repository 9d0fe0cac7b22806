"""The parts of a model card that are the same for every checkpoint. Each code block goes on from the quick start."""

QUICK_START = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{name}"
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
image = Image.open("page.png")
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "what is the code on the blue circle?"}}]
chat = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=32, return_zoom_reports=True)
print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(output.zoom_reports[0].reason, output.zoom_reports[0].box)  # why it zoomed or not, and where
```

Needs `torch`, `pillow` and `transformers` 5.20 or newer, below 6; nothing else is to be installed. `zoom="never"` is
the plain model, `zoom="always"` skips the gate; `gate_threshold`, `region_threshold`, `crop_max_tokens` and `effort`
set what zooming costs. Budgets are in merged visual tokens, the ones that the decoder sees."""

PIPELINE = """\
```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
print(pipe(chat, max_new_tokens=32, generate_kwargs={"zoom": "auto"}, return_full_text=False)[0]["generated_text"])
```

Zoom options go into `generate_kwargs`."""

FOUR_BIT = """\
```python
import torch
from transformers import BitsAndBytesConfig

recipe = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules={vision},
)
small = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, quantization_config=recipe)
```

Needs `pip install accelerate bitsandbytes`. The skip list keeps the vision side in 16 bit; gate head, region queries
and keys and the output embedding stay so by themselves. 4 bit saves memory, not time."""

# where a family's vision side is, by `model_type`; elsewhere it is "model.visual"
VISION = {"llava": ["model.vision_tower", "model.multi_modal_projector"]}

FOUR_BIT_STORED = """\
The weights are quantized already: `from_pretrained` needs no `quantization_config`. 4 bit saves memory, not time."""

OVERLAY = """\
```python
output.zoom_reports[0].overlay(image).save("where-it-looked.png")
```

draws the heat map, the box, the crop and what the gate said; `print(output.zoom_reports[0])` draws it in text."""

PIN = """\
This repository holds code that `trust_remote_code=True` runs on your machine. Read it, then pin the revision that you
have read, by its commit hash from the tab "Files and versions": `from_pretrained(name, revision="<hash>",
trust_remote_code=True)`, for model and processor alike. A later change then reaches you only when you ask for it."""

CITATION = """\
The method is Q-Zoom ([arXiv:2604.06912](https://arxiv.org/abs/2604.06912)), which extends SD-RPN
([arXiv:2509.16944](https://arxiv.org/abs/2509.16944)). The code is an independent implementation."""

FIGURE_NAMES = """\
`fine` questions ask for small print, `coarse` ones do not; accuracy is that of exact answers. `plain` is the VLM at
the coarse budget, `plain_8x` at eight times it. `fine_accuracy_zoom` and `region_…` are measured with `zoom="always"`,
`coarse_accuracy_zoom`, `zoomed_share_coarse`, `multi_…` (two places) and `absent_…` (not on the page) with the gate.
`region_recall`: the box covers nine tenths of what was asked about; `region_area`: the box's share of the image;
`gate_auroc`: how well the gate tells fine from coarse; `gating_loss`: accuracy always zoomed minus accuracy gated."""

UNKNOWN_TRAINING = "The author of this checkpoint has not stated it."

DEFAULT_LIMITS = """\
- One box per question: evidence in several places makes one large box.
- Videos pass through without zooming.
- Where it zooms, branches and crop come on top of the coarse pass: at the same image budget it is never faster than
  the plain model. It pays when a small coarse budget with zooming replaces a large budget without.
- Figures hold for the budgets, dtype, attention and versions that stand beside them."""
