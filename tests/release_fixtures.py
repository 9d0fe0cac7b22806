"""Tiny checkpoints as data-only folders and as built ones."""

import shutil
from pathlib import Path

from hub_release.build import build

from .loading_fixtures import ZOOM_CONFIG, attach
from .processing_fixtures import PROCESSORS
from .tiny import tiny_vlm


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
    output = build(data_folder(family, folder / "data"), folder / "built")
    shutil.rmtree(folder / "data")
    return output
