"""Environments that have never heard of this package, and a process in one of them that asks a built folder.

`make_environment` makes a virtual environment with torch, transformers and pillow only; `probe` runs `probe.py` in an
isolated interpreter of any environment and returns what each Auto class, the pipeline and a re-saved copy answered.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any


PACKAGES = ("torch", "transformers", "pillow")
PROBE = Path(__file__).with_name("probe.py")


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
        requirement = name if any(mark in name for mark in "<>=") else f"{name}=={version(name).split('+')[0]}"
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip install {requirement} failed: {done.stderr[-1000:]}")
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
        options: options of `generate`, e.g. `{"zoom": "always", "max_new_tokens": 8}`.
        model_options: options of the model's `from_pretrained`, e.g. where an add-on's base is.
        timeout: seconds that loading and asking may take.

    Returns:
        `answers`: for each door (Auto classes, "pipeline", "reloaded") a dict with `text` and, where reports are to
        be had, `tokens`, `gate_probability` and `box`; `present`: optional packages that could be imported there;
        `auto_map` and `code`: references and code files of the re-saved copy; `model_type`.

    Raises:
        RuntimeError: the process failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as home:
        task = {
            "checkpoint": str(Path(checkpoint).resolve()),
            "image": str(Path(image).resolve()),
            "question": question,
            "options": options or {},
            "model_options": model_options or {},
            "work": home,
        }
        # nothing of the caller's Python or Hugging Face settings reaches the child
        inherited = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "OMP_NUM_THREADS") if key in os.environ}
        environment = {**inherited, "HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "TMPDIR": home}
        command = [str(python), "-I", str(PROBE.resolve()), json.dumps(task)]
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
