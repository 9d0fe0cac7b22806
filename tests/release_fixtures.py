"""Tiny checkpoints as data-only folders and as built ones, and a tokenizer for the golden cases."""

import atexit
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hub_release.build import build
from hub_release.checks.clean_environment import make_environment
from hub_release.convert_official import convert
from hub_release.repository.files import EVALUATION
from tests.golden import load_case
from tests.loading_fixtures import ZOOM_CONFIG, attach
from tests.processing_fixtures import PROCESSORS
from tests.tiny import QWEN_SPECIALS, qwen_tokenizer, tiny_vlm


ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
FIGURES = {
    "summary": {"fine_accuracy_zoom": 0.75, "gate_auroc": 0.5},
    "intervals": {"fine_accuracy_zoom": [0.7, 0.8], "gate_auroc": [0.4, 0.6]},
    "by_page_kind": {"scene": {"rows": 3, "summary": {"fine_accuracy_zoom": 1.0, "gate_auroc": 0.5}}},
    "other": {"multi_accuracy_zoom": 0.125},
    "conditions": {
        "command": "python -m modeling_qzoom.evaluation --model tiny",
        "rows": 8,
        "gate_threshold": 0.1,
        "effort": None,
        "dtype": "float32",
    },
}


@cache
def clean_python() -> str:
    """An interpreter with torch, transformers and pillow only, made once a run; QZOOM_CLEAN_PYTHON may name one."""
    given = os.environ.get("QZOOM_CLEAN_PYTHON")
    if given:
        return given
    folder = tempfile.mkdtemp(prefix="qzoom-clean-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(make_environment(folder))


def data_folder(family: str, folder: Path) -> Path:
    """A checkpoint as it is committed: no code, no references to code."""
    model = attach(tiny_vlm(family), family)
    model.config.region_threshold_mode, model.config.region_threshold = "peak", 0.6
    model.save_pretrained(folder)
    PROCESSORS[family](**ZOOM_CONFIG[family]).save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    (folder / "README.md").write_text("# tiny\n")
    return folder


def built_folder(family: str, folder: Path) -> Path:
    """The same, loadable."""
    output = build(data_folder(family, folder / "data"), folder / "built", licence="apache-2.0")
    shutil.rmtree(folder / "data")
    return output


def write_figures(checkpoint: Path, **contents: dict[str, Any]) -> None:
    """What was measured with a checkpoint, by kind of figures."""
    (checkpoint / EVALUATION).mkdir(exist_ok=True)
    for kind, content in contents.items():
        (checkpoint / EVALUATION / f"{kind}.json").write_text(json.dumps(content))


def published_folder(folder: Path) -> Path:
    """A built one with everything that a repository may have: figures, an author's card, a named base model."""
    data = data_folder("qwen2_5_vl", folder / "data")
    head = "---\nlanguage: en\ntags:\n- tiny\n---\n"
    (data / "README.md").write_text(f"{head}\n# tiny\n\nFor tests.\n\n## Limits\n\nAll.\n")
    write_figures(data, figures=FIGURES, times={"all of it": 90.0})
    (folder / "base").mkdir()
    (folder / "base" / "LICENSE.txt").write_text("the base model's terms\n")
    return build(data, folder / "built", base="someone/base", base_folder=folder / "base", licence="apache-2.0")


def golden_tokenizer(folder: Path) -> Path:
    """A folder with 128 tokens: one per printable ASCII character, the special ones where the golden cases' are."""
    specials = dict(zip(QWEN_SPECIALS, (0, 126, 127, 3, 4, 5, 6), strict=True))
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # the last two: space and line end
    vocabulary = specials | {character: 7 + index for index, character in enumerate(characters)}
    unused = (f"<unused{index}>" for index in range(128))
    vocabulary |= {next(unused): index for index in range(128) if index not in vocabulary.values()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left")
    fast.add_special_tokens({"additional_special_tokens": QWEN_SPECIALS})
    fast.pad_token, fast.eos_token = "<|endoftext|>", "<|im_end|>"
    fast.chat_template = qwen_tokenizer().chat_template
    fast.save_pretrained(folder)
    return folder


def converted_golden(case: str, folder: Path) -> Path:
    """A checkpoint in the authors' format, converted; it has no tokenizer."""
    convert(load_case(case).write_checkpoint(folder / "official"), folder / "converted")
    return folder / "converted"
