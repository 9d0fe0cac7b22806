"""What each setting of the dial says and costs: python examples/dial.py [--image FILE --question TEXT]"""

from common import FINE, PAGE, arguments, file
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


options = arguments(__doc__, image={"type": file, "default": PAGE}, question={"default": FINE})
model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
image = Image.open(options.image)


def ask(coarse: dict, dial: dict) -> None:
    """Asks with a coarse budget (the processor's) and zoom options (those of `generate`)."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": options.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **coarse,
    ).to(model.device)
    output = model.generate(**inputs, **dial, max_new_tokens=16, return_zoom_reports=True)
    answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    report = output.zoom_reports[0]
    setting = ", ".join(f"{name}={value}" for name, value in {**coarse, **dial}.items()) or "as the checkpoint says"
    print(f"{setting:62} {answer:10} {report.reason:12} {report.coarse_tokens:4} + {report.crop_tokens}")


print(f"{options.question}\n{'setting':62} {'answer':10} {'reason':12} coarse + crop tokens")
ask({}, {})
for zoom in ("never", "always"):
    ask({}, {"zoom": zoom})
for threshold in (0.1, 0.9):
    ask({}, {"gate_threshold": threshold})
for threshold in (0.3, 0.8):
    ask({}, {"zoom": "always", "region_threshold": threshold, "region_threshold_mode": "peak"})
ask({}, {"zoom": "always", "crop_max_tokens": 64})
ask({"max_tokens": 36, "min_tokens": 16}, {"zoom": "always"})
for preset in model.config.presets:  # "fast", "balanced", "accurate" where the checkpoint was calibrated
    ask({}, {"effort": preset})

model.generation_config.zoom = "never"  # for every later call, and saved with the model
ask({}, {})
