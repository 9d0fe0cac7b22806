"""Asks a built folder the same question through every door, in a process that does not know this package.

`make_environment` makes a virtual environment with torch, transformers and pillow only; `probe` runs this file in an
isolated interpreter of any environment and returns what each Auto class, the pipeline and a re-saved copy answered.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


PACKAGES = ("torch", "transformers", "pillow")
MODEL_DOORS = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
OPTIONAL_PACKAGES = ("accelerate", "peft", "bitsandbytes", "torchvision", "modeling_qzoom")


def make_environment(folder: str | Path, packages: tuple[str, ...] = PACKAGES) -> Path:
    """Makes a virtual environment with the versions that are installed here.

    Args:
        packages: what to install, in this order; a plain name takes the version of this environment.

    Returns:
        Its interpreter.

    Raises:
        RuntimeError: an installation failed; the message ends with what pip said.
    """
    venv.create(folder, with_pip=True, clear=True)
    python = Path(folder) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for name in packages:
        wanted = name if any(mark in name for mark in "<>=") else f"{name}=={version(name).split('+')[0]}"
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip install {wanted} failed: {done.stderr[-1000:]}")
    return python


def probe(
    checkpoint: str | Path,
    image: str | Path,
    question: str,
    *,
    python: str | Path = sys.executable,
    options: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    timeout: float = 900,
) -> dict[str, Any]:
    """Loads a folder in a fresh interpreter with an empty home and asks it a question about an image.

    Args:
        checkpoint: folder that holds model, processor and code.
        image: an image file.
        python: the interpreter, e.g. of `make_environment`.
        options: for `generate`, e.g. `{"zoom": "always", "max_new_tokens": 8}`.
        model_options: for the model's `from_pretrained`, e.g. where an add-on's base is.
        timeout: in seconds.

    Returns:
        `answers`: per door (Auto classes, "pipeline", "reloaded") a dict with `text` and, where reports are to be had,
        `tokens`, `gate_probability` and `box`; `present`: optional packages that could be imported there;
        `auto_map`: of the re-saved config.

    Raises:
        RuntimeError: the process failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as home:
        task = {"checkpoint": str(Path(checkpoint).resolve()), "image": str(Path(image).resolve())}
        task |= {"question": question, "options": options or {}, "model_options": model_options or {}, "work": home}
        # nothing of the caller's Python or Hugging Face settings reaches the child
        inherited = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "OMP_NUM_THREADS") if key in os.environ}
        environment = {**inherited, "HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "TMPDIR": home}
        command = [str(python), "-I", str(Path(__file__).resolve()), json.dumps(task)]
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{checkpoint} could not be used in a clean process: {done.stderr[-3000:]}")
        return json.loads((Path(home) / "result.json").read_text())


def disagreements(answers: dict[str, dict[str, Any]], tolerance: float = 1e-4) -> list[str]:
    """Doors whose answer differs from that of the first one, by anything that both report."""
    doors = iter(answers.items())
    _, expected = next(doors)
    wrong = []
    for door, answer in doors:
        for key in expected.keys() & answer.keys():
            numbers = isinstance(expected[key], float) and isinstance(answer[key], float)
            same = abs(expected[key] - answer[key]) <= tolerance if numbers else expected[key] == answer[key]
            if not same:
                wrong.append(f"{door}: {key} is {answer[key]!r}, expected {expected[key]!r}")
    return wrong


# --- in the child ----------------------------------------------------------------------------------------------------


def _ask(model, processor, image, question: str, options: dict[str, Any]) -> dict[str, Any]:
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


def _answer_task(task: dict[str, Any]) -> dict[str, Any]:
    import transformers
    from PIL import Image

    transformers.utils.logging.disable_progress_bar()
    folder, trust = task["checkpoint"], {"trust_remote_code": True}
    image = Image.open(task["image"]).convert("RGB")
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    processor = transformers.AutoProcessor.from_pretrained(folder, **trust)
    answers = {}
    for door in MODEL_DOORS:
        # not kept until the next one is loaded: a large model fits once
        model = getattr(transformers, door).from_pretrained(folder, **trust, **task["model_options"])
        answers[door] = _ask(model, processor, image, task["question"], task["options"])
        del model
    content = [{"type": "image", "image": image}, {"type": "text", "text": task["question"]}]
    pipe = transformers.pipeline("image-text-to-text", model=folder, model_kwargs=task["model_options"], **trust)
    said = pipe(
        [{"role": "user", "content": content}],
        generate_kwargs={"do_sample": False, **task["options"]},
        return_full_text=False,
    )
    answers["pipeline"] = {"text": said[0]["generated_text"]}

    copy = Path(task["work"]) / "resaved"
    if config.lora_subfolder is None:
        pipe.model.save_pretrained(copy)
    else:
        pipe.model.save_addon(copy)  # of a model with an adapter, save_pretrained of transformers writes only that
    processor.save_pretrained(copy)
    del pipe
    again = transformers.AutoModelForImageTextToText.from_pretrained(copy, **trust)
    processor = transformers.AutoProcessor.from_pretrained(copy, **trust)
    answers["reloaded"] = _ask(again, processor, image, task["question"], task["options"])
    return {
        "answers": answers,
        "present": [name for name in OPTIONAL_PACKAGES if find_spec(name) is not None],
        "auto_map": json.loads((copy / "config.json").read_text())["auto_map"],
        "code": sorted(path.name for path in copy.glob("*.py")),
        "model_type": config.model_type,
    }


def _child() -> None:
    parser = argparse.ArgumentParser(description="answers one task, given as JSON; used by probe()")
    parser.add_argument("task", type=json.loads)
    task = parser.parse_args().task
    # an editable install of our package in this environment must not answer for the folder
    sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "modeling_qzoom").is_dir()]
    (Path(task["work"]) / "result.json").write_text(json.dumps(_answer_task(task)))


if __name__ == "__main__":
    _child()
