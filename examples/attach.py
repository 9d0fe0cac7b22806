"""Attach Q-Zoom to a plain VLM: python examples/attach.py [--backbone Qwen/Qwen2.5-VL-3B-Instruct --layer 24]

By default the backbone is the plain VLM inside the bundled checkpoint, saved as a repository of its own. Fresh
branches are copies of decoder layers: they have to be trained (examples/train_own_data.py) before zooming helps.
"""

import torch
from common import FINE, OUT, PAGE, arguments, plain_backbone, positive
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_qzoom import QZoomForConditionalGeneration, QZoomProcessor


options = arguments(
    __doc__, backbone={}, layer={"type": positive, "default": 3}, output={"default": str(OUT / "attached-addon")}
)
backbone = options.backbone or plain_backbone(options.model)
budget = {"min_tokens": 32, "max_tokens": 64}  # merged visual tokens of the coarse view; for a 3B rather 256 to 576
model = QZoomForConditionalGeneration.from_backbone(
    backbone, branch_layer=options.layer, branch_depth=2, zoom_config=budget, device_map="auto"
)
processor = QZoomProcessor.from_backbone(backbone, **budget)
sizes = [sum(weight.numel() for weight in part.parameters()) / 1e6 for part in (model.vlm, model.zoom)]
print(f"{type(model.vlm).__name__}: {sizes[0]:.2f} million weights, the branches {sizes[1]:.2f} million more")

content = [{"type": "image", "image": Image.open(PAGE)}, {"type": "text", "text": FINE}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
off = model.generate(**inputs, zoom="never", max_new_tokens=16, do_sample=False)
plain = AutoModelForImageTextToText.from_pretrained(backbone, device_map="auto")
inputs_of_plain = {name: value for name, value in inputs.items() if not name.startswith("source")}
alone = plain.generate(**inputs_of_plain, max_new_tokens=16, do_sample=False)
print(f"zoom='never' says what the plain VLM says: {torch.equal(off, alone)}")

model.save_addon(options.output)  # the branches only; the backbone is named in the config
processor.save_pretrained(options.output)
loaded = AutoModelForImageTextToText.from_pretrained(options.output, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.output, trust_remote_code=True)
again = loaded.generate(**inputs, zoom="always", max_new_tokens=16, do_sample=False, return_zoom_reports=True)
print(f"loaded from {options.output} together with its backbone: {again.zoom_reports[0].reason}")
