"""Other forms of a checkpoint's weights, and a processor around a tokenizer: what `build.py` needs the library for."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from hub_release.official.format import image_settings
from hub_release.repository.errors import BuildError
from hub_release.repository.files import read_json
from hub_release.repository.processor import build_processor
from hub_release.repository.tensors import stored_tensors, variant_of
from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from modeling_qzoom.backbones_qzoom import token_grid_of


def four_bit_recipe(config: QZoomConfig) -> BitsAndBytesConfig:
    """nf4 with double quantization for decoder and branches.

    The vision side stays in 16 bit: it is a small share of the weights, and regions are found in what it sees. The
    library adds gate head, region queries and keys, and the output embedding to what is left alone.
    """
    with torch.device("meta"):
        vlm = QZoomForConditionalGeneration(config).vlm
    vision = [f"vlm.model.{name}" for name, _ in vlm.model.named_children() if name != "language_model"]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=vision,
    )


def write_variant(
    checkpoint: Path,
    folder: Path,
    variant: str,
    *,
    base: str | None = None,
    base_folder: Path | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Writes the checkpoint's weights and configurations in another form.

    Args:
        checkpoint: full checkpoint or add-on.
        folder: folder to write to.
        variant: "full", "addon" or "4bit".
        base: name of the plain VLM; for an add-on, as its users reach it.
        base_folder: where the plain VLM is on this machine, if not under its name.
        max_shard_size: size of the largest file, e.g. "5GB"; transformers' default if None.

    Raises:
        BuildError: the checkpoint is quantized already, or the library refuses; the message says why.
    """
    is_addon = variant_of({}, stored_tensors(checkpoint)) == "addon"
    if read_json(checkpoint / "config.json").get("quantization_config") and not is_addon and variant != "full":
        raise BuildError(f"{checkpoint} is quantized; build --variant {variant} from the checkpoint in 16 bit.")
    options: dict[str, Any] = {"dtype": "auto"}
    if is_addon and (base_folder or base):
        options["base_model_name_or_path"] = str(base_folder or base)
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    try:
        if variant == "4bit":
            options["quantization_config"] = four_bit_recipe(QZoomConfig.from_pretrained(checkpoint))
        model = QZoomForConditionalGeneration.from_pretrained(checkpoint, **options)
        if variant == "addon":
            model.save_addon(folder, base_model_name_or_path=base_folder or base)
        else:
            model.save_pretrained(folder, **sizes)
    except (ValueError, OSError, ImportError) as error:
        raise BuildError(f"{checkpoint}, --variant {variant}: {error}") from error


def _image_settings(config: QZoomConfig, tokenizer: Path) -> dict[str, Any]:
    """Settings of the image processor that the checkpoint was made with, for VLMs without a fixed grid."""
    if not config.backbone.grid.has_budget:
        raise BuildError(
            f"a {config.vlm_config.model_type} processor has settings that no checkpoint holds; let --tokenizer name "
            f"the plain VLM's folder ({tokenizer} lacks preprocessor_config.json or processor_config.json)."
        )
    geometry = token_grid_of(config.vlm_config)
    low, high = (budget * geometry.token_side**2 for budget in (config.min_tokens or 4, config.max_tokens or 16384))
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": geometry.patch,
        "merge_size": geometry.merge,
        "temporal_patch_size": geometry.temporal_patch,
        "size": {"shortest_edge": low, "longest_edge": high},
    }


def write_processor(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Writes the processor that a checkpoint without a tokenizer lacks.

    Args:
        tokenizer: folder with the VLM's tokenizer and chat template, and perhaps its image settings.

    Raises:
        BuildError: the tokenizer is missing, has no chat template, or is another model's.
    """
    config = QZoomConfig.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch)
        for path in tokenizer.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != "config.json":
                shutil.copyfile(path, plain / path.name)
        settings = image_settings(plain) or _image_settings(config, tokenizer)
        settings |= {"image_mean": config.image_mean, "image_std": config.image_std}
        (plain / "preprocessor_config.json").write_text(json.dumps(settings))
        try:
            processor = build_processor(plain, config)
        except (ValueError, OSError) as error:
            raise BuildError(f"--tokenizer {tokenizer}: {error}") from error
    if processor is None:
        raise BuildError(f"--tokenizer {tokenizer} holds no tokenizer, or lacks the VLM's processor_config.json.")
    if not processor.chat_template:
        raise BuildError(f"--tokenizer {tokenizer} has no chat template.")
    vocabulary = config.get_text_config().vocab_size
    if len(processor.tokenizer) > vocabulary or processor.image_token_id != config.image_token_id:
        raise BuildError(
            f"--tokenizer {tokenizer} is another model's: it has {len(processor.tokenizer)} tokens, with the image at "
            f"{processor.image_token_id}; the checkpoint has {vocabulary}, with the image at {config.image_token_id}."
        )
    processor.save_pretrained(folder)
