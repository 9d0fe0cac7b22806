"""What the examples share: the checkpoint they run on and the page they ask about. Your own code needs none of it."""

import argparse
import json
import logging as python_logging
import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL.Image import DecompressionBombError
from safetensors import SafetensorError
from transformers.utils import logging


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hub_release.build import build  # noqa: E402


CHECKPOINT = ROOT / "hub_release" / "checkpoints" / "qzoom-demo"
DEMO = ROOT / "build" / "qzoom-demo"
OUT = ROOT / "out"
PAGE = ROOT / "examples" / "assets" / "page.png"
_asked = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))["questions"]
QUESTIONS = [item["question"] for item in _asked]
FINE = next(item["question"] for item in _asked if item["kind"] == "fine")
"""The question whose answer is in small print."""
_INPUT_AT_FAULT = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, DecompressionBombError)


def in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python shows when an example ends with an error: one line, unless the example itself is at fault."""
    if issubclass(kind, _INPUT_AT_FAULT):
        sys.stderr.write(f"error: {' '.join(str(error).split()) or kind.__name__}\n")
    else:
        sys.__excepthook__(kind, error, traceback)


def positive(text: str) -> int:
    """An option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def file(text: str) -> Path:
    """An option's file, which exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)


def folder(text: str) -> Path:
    """An option's folder, which exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text)


def demo_folder() -> Path:
    """The bundled checkpoint as a folder that loads, made from its data and this package's code where it is missing or
    older than they are."""
    sources = [*CHECKPOINT.rglob("*"), *(ROOT / "modeling_qzoom").glob("*.py")]
    built = DEMO / "config.json"
    if not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        fresh = build(CHECKPOINT, DEMO.with_name(f"qzoom-demo-{os.getpid()}"), force=True)
        shutil.rmtree(DEMO, ignore_errors=True)
        try:
            fresh.rename(DEMO)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    return DEMO


def arguments(description: str, **more: dict) -> argparse.Namespace:
    """Options of an example: `--model`, and `more` by name, each with the keywords of `add_argument`."""
    sys.excepthook = in_one_line
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # save_addon compares with the base weight by weight, from the disk
    python_logging.getLogger("accelerate.big_modeling").setLevel(python_logging.ERROR)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of a Q-Zoom checkpoint; the bundled one by default")
    for name, keywords in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    options = parser.parse_args()
    for name, value in vars(options).items():
        if isinstance(value, str) and as_utf8(value) != value:
            parser.error(f"--{name.replace('_', '-')} is no text in UTF-8")
    options.model = options.model or str(demo_folder())
    return options


def load_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def as_utf8(text: str) -> str:
    """A file's name as text that can be stored anywhere: bytes of it that are no UTF-8 are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_rows(path: Path, schema: Any) -> list[dict]:
    """Rows of a parquet file that `write_rows` wrote with this schema."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); move it away, or name another folder") from None
    if table.column_names != schema.names:
        raise ValueError(f"{path} holds other columns than {schema.names}; move it away, or name another folder")
    return table.to_pylist()


def write_rows(rows: list[dict], schema: Any, path: Path) -> None:
    """A parquet file, whole or not at all; none without rows."""
    from pyarrow import Table, parquet

    if not rows:
        path.unlink(missing_ok=True)
        return
    partial = path.with_suffix(".partial")
    parquet.write_table(Table.from_pylist(rows, schema=schema), partial)
    partial.replace(path)


def plain_backbone(folder: str) -> str:
    """The plain VLM inside a Q-Zoom checkpoint, saved as the repository that it might have come from."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    output = OUT / "plain-vlm"
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.vlm.save_pretrained(output)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.backbone_processor.save_pretrained(output)
    return str(output)


def demo_images(across: int = 4) -> Path:
    """A folder with pieces of the bundled page."""
    from PIL import Image

    folder, page = OUT / "pieces", Image.open(PAGE)
    folder.mkdir(parents=True, exist_ok=True)
    width, height = page.width // across, page.height // across
    for place in range(across * across):
        left, top, file = place % across * width, place // across * height, folder / f"{place:02}.png"
        if not file.exists():  # several processes ask for it
            page.crop((left, top, left + width, top + height)).save(file)
    return folder
