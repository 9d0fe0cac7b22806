"""Every fenced block of the README: Python runs, bash is read by bash and each command is run or checked.

What cannot happen here has a stand-in: models of the Hub are tiny random ones of the same family; commands that
install, train or measure for long are parsed by the program that would run them. A block of an unknown kind fails.
"""

import json
import re
import subprocess

import pytest
import yaml
from packaging.requirements import Requirement

from hub_release.build import build
from hub_release.card.tables import figure_table, page_kind_table, short_table, spread_table
from hub_release.demo.recipe import MARKERS, REPORT, history_of
from modeling_qzoom.training.__main__ import STAGES
from modeling_qzoom.training.common.config_files import load_config
from tests.readme_fixtures import ROOT, Block, Reader, blocks, new_reader, promised_output, run_here


README = ROOT / "README.md"
BLOCKS = blocks(README)
CHECKPOINT = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
# languages whose blocks show something that nobody runs
SHOWN = {"text": "output or a drawing", "bibtex": "an entry to copy"}
# stops a program where it has understood its arguments
PARSE_ONLY = """
import argparse, os, runpy, sys
for name in ("parse_args", "parse_known_intermixed_args"):
    def stop(self, *args, _real=getattr(argparse.ArgumentParser, name), **kwargs):
        _real(self, *args, **kwargs)
        raise SystemExit(0)
    setattr(argparse.ArgumentParser, name, stop)
how, name, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = name
sys.path.insert(0, os.path.dirname(name))  # as for a script that is run
run = runpy.run_module if how == "-m" else runpy.run_path
run(name, run_name="__main__")
raise SystemExit(f"{name} has not looked at its arguments")
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    """In a clone where `make demo` was run."""
    reader = new_reader(tmp_path_factory.mktemp("reader"))
    build(CHECKPOINT, reader.clone / "build" / "qzoom-demo")
    return reader


# --- commands --------------------------------------------------------------------------------------------------------


def check_install(arguments: list[str]) -> None:
    """Names and extras exist; that they can be installed is test_packaging's."""
    extras = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    wanted = [word for word in arguments if not word.startswith("-") and "://" not in word]
    assert wanted, f"pip install {arguments} installs nothing"
    for word in wanted:
        requirement = Requirement("qzoom" + word[1:] if word.startswith(".") else word)
        assert requirement.name != "qzoom" or requirement.extras <= extras, f"{word}: the extras are {sorted(extras)}"


def check_stage(arguments: list[str], reader: Reader) -> None:
    """The stage exists and its options are ones that it takes."""
    stage, *rest = arguments
    assert stage in STAGES, f"there is no stage {stage!r}"
    given = dict(zip(rest[::2], rest[1::2])) if "--config" in rest[:1] else {}
    config = given.get("--config")
    overrides = rest[2:] if config else rest
    load_config(STAGES[stage].config, config and reader.clone / config, overrides)


def check_arguments(command: list[str], reader: Reader) -> None:
    """The program reads its arguments without complaint."""
    how, name = command[:2] if command[0] == "-m" else ("", command[0])
    rest = command[2:] if command[0] == "-m" else command[1:]
    run_here(["-c", PARSE_ONLY, how, name, *rest], reader.clone)


def check_python(command: list[str], reader: Reader) -> None:
    if command[:2] == ["-m", "modeling_qzoom.training"]:
        check_stage(command[2:], reader)
    elif command[0] == "-m" and command[1] in ("venv", "pip"):
        if command[1:3] == ["pip", "install"]:
            check_install(command[3:])
    elif command[0].startswith("examples/") and not any(word.isupper() for word in command[1:]):
        run_here([reader.with_stand_ins(word) for word in command], reader.clone)
    else:
        check_arguments(command, reader)


def check_command(command: list[str], reader: Reader) -> None:
    """Runs one command that a block came to, or checks it where running it would take too long or the network."""
    program, *arguments = command
    if program in ("python", "python3"):
        check_python(arguments, reader)
    elif program == "pip" and arguments[0] == "install":
        check_install(arguments[1:])
    elif program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "accelerate" and arguments[0] == "launch":
        program_at = next(at for at, word in enumerate(arguments) if word == "-m" or word.endswith(".py"))
        if "--config_file" in arguments[:program_at]:
            assert (reader.clone / arguments[arguments.index("--config_file") + 1]).is_file()
        check_python(arguments[program_at:], reader)
    else:  # these need the network
        assert (program, arguments[0]) in {("git", "clone"), ("hf", "auth"), ("hf", "download")}, (
            f"nothing is known about the command {command}: say in check_command of this file how it is run or checked"
        )


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_the_readme_has_blocks_to_run():
    assert {block.language for block in BLOCKS} >= {"python", "bash"}


def test_ten_lines_print_what_they_promise(tmp_path):
    """In the quick tier too: the first Python block, in front of the built demo checkpoint."""
    build(CHECKPOINT, tmp_path / "build" / "qzoom-demo")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    block = next(block for block in BLOCKS if block.language == "python")
    promised = promised_output(block.text)
    assert promised and Reader(tmp_path, tmp_path / "stand-ins").run_python(block) == promised


@pytest.mark.slow
# TRL's and peft's own, on the newest transformers
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(block: Block, reader: Reader):
    """In the README's order: a block may use what those before it have made."""
    if block.language == "python":
        printed, promised = reader.run_python(block), promised_output(block.text)
        assert not promised or printed == promised
    elif block.language == "bash":
        for command in reader.commands(block):
            check_command(command, reader)
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict)
    else:
        assert block.language in SHOWN, (
            f"README line {block.line}: a block marked {block.language!r} is neither run (python, bash, yaml) nor "
            f"one of {SHOWN}; mark it, or say in tests/documents/test_readme.py how it is checked"
        )


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_demo_are_those_of_its_figures():
    """As `hub_release/demo/recipe.py` writes them; a number changed by hand would be a claim that no command makes."""

    def held(kind):
        return json.loads((CHECKPOINT / "evaluation" / f"{kind}.json").read_text())

    def between_markers(path):
        return path.read_text(encoding="utf-8").split(MARKERS[0])[1].split(MARKERS[1])[0].strip()

    figures = held("figures")
    parts = [figure_table(figures, held("shifted")), page_kind_table(figures), spread_table(held("seeds"))]
    assert between_markers(README) == short_table(figures)
    assert between_markers(REPORT) == "\n\n".join([*parts, history_of(held("times"))])


# --- the checks themselves -------------------------------------------------------------------------------------------


def test_promises_are_the_comments_below_a_print():
    source = "# no promise\nprint(1)\n# 1\n# 2\nx = 3\n# no promise\n"
    source += "for y in (4, 5):\n    print(\n        y\n    )\n    # 4\n    # 5\n"
    assert promised_output(source) == ["1", "2", "4", "5"]
    assert promised_output("x = 1\n# nothing\nprint(x)\n\n# nothing\n") == []


def test_blocks_are_found_with_their_lines(tmp_path):
    (tmp_path / "R.md").write_text("a\n```python\nx = 1\n```\ntext\n```bash\nmake demo\n```\n")
    assert blocks(tmp_path / "R.md") == [Block(3, "python", "x = 1\n"), Block(7, "bash", "make demo\n")]
    (tmp_path / "R.md").write_text("- a\n  ```python\n  x = 1\n  ```\n")
    with pytest.raises(AssertionError, match="2 fences, but 0 blocks"):
        blocks(tmp_path / "R.md")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Reader:
    return new_reader(tmp_path_factory.mktemp("clone"))


def test_bash_reads_functions_and_loops(clone):
    text = 'stage() { python -m x "$1" --k=v; }\nfor name in a b; do stage $name; done\nA="c d" make demo\n'
    assert clone.commands(Block(1, "bash", text)) == [
        ["python", "-m", "x", "a", "--k=v"],
        ["python", "-m", "x", "b", "--k=v"],
        ["make", "demo"],
    ]
    with pytest.raises(AssertionError, match="line 7 .*frobnicate"):
        clone.commands(Block(7, "bash", "frobnicate --all\n"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("pip install -e '.[trian]'", "the extras are"),
        ("make dmeo", "dmeo"),
        ("python -m modeling_qzoom.training train-region", "no stage"),
        ("python -m modeling_qzoom.training train-gate --config nowhere.yaml", "nowhere.yaml"),
        ("python -m modeling_qzoom.training train-gate modle=x", "modle"),
        pytest.param("python -m modeling_qzoom.evaluation --modle x", "modle", marks=pytest.mark.slow),
        ("python hub_release/build.py IN OUT --frce", "frce"),
        ("python hub_release/biuld.py IN OUT", "biuld"),
        ("git push", "nothing is known"),
    ],
)
def test_a_wrong_command_is_found(clone, line, message):
    (command,) = clone.commands(Block(1, "bash", line))
    with pytest.raises((AssertionError, ValueError), match=message):
        check_command(command, clone)
