"""A processor around a tokenizer and the model's own image settings."""

import shutil
import tempfile
from pathlib import Path

from hub_release.official.format import image_settings, read_json
from modeling_qzoom import QZoomConfig, QZoomProcessor


TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def copy_matching(folder: Path, patterns: tuple[str, ...], target: Path) -> list[str]:
    """Copies a folder's files whose names match one of the patterns, and returns their names."""
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    for file in files:
        shutil.copy(file, target / file.name)
    return [file.name for file in files]


def build_processor(folder: Path, config: QZoomConfig) -> QZoomProcessor | None:
    """The folder's tokenizer and image processor as one; None where one of them is missing."""
    needed = config.backbone.grid.extra_processor_arguments
    if not image_settings(folder) or set(needed) - set(read_json(folder, "processor_config.json") if needed else ()):
        return None
    with tempfile.TemporaryDirectory() as plain:
        # the folder as a plain VLM of transformers would have it
        if not copy_matching(folder, TOKENIZER_FILES, Path(plain)):
            return None
        copy_matching(folder, PROCESSOR_FILES, Path(plain))
        config.vlm_config.save_pretrained(plain)
        return QZoomProcessor.from_backbone(plain, min_tokens=config.min_tokens, max_tokens=config.max_tokens)
