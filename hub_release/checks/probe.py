"""Answers one question about an image through every door of a folder; runs alone in the process that `probe` starts.

Whatever interpreter runs it, this file needs the standard library, transformers and pillow only, and nothing of this
repository.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from PIL import Image


MODEL_DOORS = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
OPTIONAL_PACKAGES = ("accelerate", "peft", "bitsandbytes", "torchvision", "modeling_qzoom")
TRUST = {"trust_remote_code": True}


def ask(model: Any, processor: Any, image: Image.Image, question: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a model answers, and what its report says about it."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    inputs = inputs.to(model.dtype) if model.dtype.is_floating_point else inputs
    output = model.generate(**inputs, **options, do_sample=False, return_zoom_reports=True)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    report = output.zoom_reports[0]
    return {
        "text": processor.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        "gate_probability": report.gate_probability,
        "box": None if report.box is None else list(report.box),
    }


def ask_pipeline(pipe: Any, image: Image.Image, question: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline answers, which has no report."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    outputs = pipe(
        [{"role": "user", "content": content}],
        generate_kwargs={"do_sample": False, **options},
        return_full_text=False,
    )
    return {"text": outputs[0]["generated_text"]}


def save_again(pipe: Any, processor: Any, folder: Path) -> None:
    """Saves what was loaded, as a user would."""
    if pipe.model.config.lora_subfolder is None:
        pipe.model.save_pretrained(folder)
    else:
        pipe.model.save_addon(folder)  # of a model with an adapter, save_pretrained of transformers writes only that
    processor.save_pretrained(folder)


def answer_task(task: dict[str, Any]) -> dict[str, Any]:
    """What `clean_environment.probe` returns.

    Args:
        task: "checkpoint", "image" (paths), "question", "options" of `generate`, "model_options" of `from_pretrained`
            and "work", a folder to write to.
    """
    folder, question, options = task["checkpoint"], task["question"], task["options"]
    image = Image.open(task["image"]).convert("RGB")
    config = transformers.AutoConfig.from_pretrained(folder, **TRUST)
    processor = transformers.AutoProcessor.from_pretrained(folder, **TRUST)
    answers = {}
    for door in MODEL_DOORS:
        # not kept until the next one is loaded: a large model fits once
        model = getattr(transformers, door).from_pretrained(folder, **TRUST, **task["model_options"])
        answers[door] = ask(model, processor, image, question, options)
        del model
    pipe = transformers.pipeline("image-text-to-text", model=folder, model_kwargs=task["model_options"], **TRUST)
    answers["pipeline"] = ask_pipeline(pipe, image, question, options)
    copy = Path(task["work"]) / "resaved"
    save_again(pipe, processor, copy)
    del pipe
    again = transformers.AutoModelForImageTextToText.from_pretrained(copy, **TRUST)
    processor = transformers.AutoProcessor.from_pretrained(copy, **TRUST)
    answers["reloaded"] = ask(again, processor, image, question, options)
    return {
        "answers": answers,
        "present": [name for name in OPTIONAL_PACKAGES if find_spec(name) is not None],
        "auto_map": json.loads((copy / "config.json").read_text())["auto_map"],
        "code": sorted(path.name for path in copy.glob("*.py")),
        "model_type": config.model_type,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="answers one task, given as JSON; see clean_environment.probe")
    parser.add_argument("task", type=json.loads)
    task = parser.parse_args().task
    transformers.utils.logging.disable_progress_bar()
    # an editable install of our package in this environment must not answer for the folder
    sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "modeling_qzoom").is_dir()]
    (Path(task["work"]) / "result.json").write_text(json.dumps(answer_task(task)))


if __name__ == "__main__":
    main()
