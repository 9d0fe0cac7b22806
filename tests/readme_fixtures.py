"""The README as a list of blocks, and a place where they can be run as a reader would run them."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, LlavaProcessor, Qwen2VLImageProcessor

from tests.families import FAMILY
from tests.processing_fixtures import LLAVA_ARGUMENTS
from tests.tiny import llava_tokenizer, qwen_tokenizer, tiny_vlm


ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
# what a fresh clone does not hold
NOT_CLONED = (".*", "build", "dist", "out", "__pycache__", "node_modules", "*.egg-info")
# repositories of the Hub whose place a tiny random model of the same family takes
HUB_FAMILIES = {
    r"Qwen/Qwen2\.5-VL-[\w-]+": "qwen2_5_vl",
    r"Qwen/Qwen3-VL-[\w-]+": "qwen3_vl",
    r"llava-hf/llava-1\.5-[\w-]+": "llava",
}
# commands that a block is given instead of the real ones; they only note that they were called
NOTED = ("accelerate", "git", "hf", "make", "pip", "python", "python3")
# commands that a block gets as they are
PLAIN = ("cat", "cp", "echo", "ls", "mkdir", "rm")
_SHIM = """#!{python} -I
import json, os, sys
with open(os.environ["README_COMMANDS"], "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
if {name!r} == "git":
    os.makedirs(sys.argv[-1].rsplit("/", 1)[-1].removesuffix(".git"), exist_ok=True)
"""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line of text in the README."""

    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.language or 'plain'}-line-{self.line}"


def blocks(readme: Path) -> list[Block]:
    """All fenced blocks, in order."""
    text = readme.read_text(encoding="utf-8")
    found = [Block(text.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in FENCE.finditer(text)]
    fences = len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert fences == 2 * len(found), f"{readme.name} has {fences} fences, but {len(found)} blocks could be read"
    return found


def promised_output(source: str) -> list[str]:
    """The comment lines right below each statement that prints: what the README says comes out there."""
    lines = source.splitlines()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    ends = {node.end_lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"}
    promised = []
    for end in sorted(ends):
        for line in lines[end:]:
            if not line.lstrip().startswith("# "):
                break
            promised.append(line.lstrip()[2:])
    return promised


def stand_in(family: str, folder: Path) -> Path:
    """A tiny random backbone with its own processor, as a repository of the Hub would hold them; 28 layers."""
    if not folder.exists():
        tiny_vlm(family, layers=28).save_pretrained(folder)
        if not FAMILY[family].has_budget:
            images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
            LlavaProcessor(images, llava_tokenizer(), **LLAVA_ARGUMENTS).save_pretrained(folder)
        else:
            Qwen2VLImageProcessor(patch_size=FAMILY[family].patch, merge_size=2).save_pretrained(folder)
            qwen_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Reader:
    """Someone who works through the README in a clone of the repository, block by block, in one Python session."""

    clone: Path
    stand_ins: Path
    names: dict[str, Any] = field(default_factory=dict)

    def with_stand_ins(self, text: str) -> str:
        """The text with names of known repositories of the Hub replaced by folders."""
        for pattern, family in HUB_FAMILIES.items():
            text = re.sub(pattern, lambda _: str(stand_in(family, self.stand_ins / family)), text)  # noqa: B023
        return text

    def run_python(self, block: Block) -> list[str]:
        """Runs a block where the ones before it left off; what it printed, by line."""
        printed = StringIO()
        code = compile("\n" * (block.line - 1) + self.with_stand_ins(block.text), "README.md", "exec")
        before = Path.cwd()
        os.chdir(self.clone)
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, self.names)
        finally:
            os.chdir(before)
        return printed.getvalue().splitlines()

    def commands(self, block: Block) -> list[list[str]]:
        """Has bash read a block, functions and loops included; the commands of `NOTED` that it came to."""
        log, shims = self.clone / ".commands", self.clone / ".shims"
        log.write_text("")
        options = {"capture_output": True, "text": True, "check": False, "cwd": self.clone}
        environment = {"PATH": str(shims), "README_COMMANDS": str(log), "HOME": str(self.clone)}
        bash = [shutil.which("bash"), "-euo", "pipefail", "-c", block.text]
        done = subprocess.run(bash, env=environment, **options)
        assert done.returncode == 0, (
            f"bash stopped in the block at line {block.line} of the README: {done.stderr}\n"
            "A command that is not found needs an entry in NOTED or PLAIN of tests/readme_fixtures.py."
        )
        return [json.loads(line) for line in log.read_text().splitlines()]


def new_reader(folder: Path) -> Reader:
    """A reader in front of a fresh clone; `python`, `pip`, `make`, … only note what they are asked."""
    clone = folder / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*NOT_CLONED))
    shims, environment = clone / ".shims", clone / ".venv" / "bin"
    shims.mkdir()
    environment.mkdir(parents=True)
    (environment / "activate").touch()
    for name in NOTED:
        (shims / name).write_text(_SHIM.format(python=sys.executable, name=name))
        (shims / name).chmod(0o755)
    for name in PLAIN:
        (shims / name).symlink_to(shutil.which(name))
    for name in ("python", "pip"):
        (environment / name).symlink_to(shims / name)
    return Reader(clone, folder / "stand-ins")


def run_here(command: list[str], folder: Path) -> str:
    """Runs a Python command line for real, in the folder, without network; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "check": False, "cwd": folder, "env": environment}
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    return done.stdout
