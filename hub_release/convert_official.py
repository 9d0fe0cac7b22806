"""Converts a checkpoint of the authors' code into a Q-Zoom checkpoint: `convert_official.py SOURCE OUTPUT`.

Reads Q-Zoom (Qwen2.5-VL, Qwen3-VL) and SD-RPN (Qwen2.5-VL, LLaVA-1.5) folders: safetensors, sharded or not, flat or
nested key names, with or without `lm_head`, with or without a tokenizer. Branch depth, position alignment, budgets and
image statistics come from the folder's own files. `--base FOLDER` fills in what SD-RPN's training outputs lack (the
layers above the branch, the final norm, `lm_head`, the vision tower, tokenizer and image settings) from the plain VLM.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig


# called as a file, Python looks for packages beside it; ours are one folder up
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub_release.official.format import (
    ConversionError,
    branch_name,
    is_unused,
    official_name,
    qzoom_config,
    read_json,
    vlm_name,
)
from hub_release.repository.processor import TOKENIZER_FILES, build_processor, copy_matching
from modeling_qzoom import QZoomConfig, QZoomForConditionalGeneration
from modeling_qzoom.loading_weight_files_qzoom import check_weight_files


_EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_STEP = 64


def read_weights(folder: Path) -> dict[str, Any]:
    """All weights of a folder by name, as safetensors slices that are read when they are needed.

    Raises:
        ConversionError: there are none, one of them is damaged, or the index names a file that is missing.
    """
    index = read_json(folder, "model.safetensors.index.json")
    if index:
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ConversionError(f"{folder}: the index names files that are missing: {missing[:3]}.")
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        hint = " It holds .bin files; convert them to safetensors first." if list(folder.glob("*.bin")) else ""
        raise ConversionError(f"{folder} holds no safetensors files.{hint}")
    weights: dict[str, Any] = {}
    for file in files:
        try:
            check_weight_files([str(file)])
            handle = safe_open(file, "pt")
        except (ValueError, SafetensorError) as error:
            raise ConversionError(str(error)) from error
        weights |= {key: handle.get_slice(key) for key in handle.keys()}
    return weights


def _some(names: list[str]) -> str:
    return f"{names[:4]}{' …' if len(names) > 4 else ''} ({len(names)} in all)"


def translate_branches(
    source: Path, branches: dict[str, Any], config: QZoomConfig, names: list[str]
) -> dict[str, Any]:
    """Branch weights under our names.

    Args:
        source: folder in the authors' format, for messages.
        branches: weights by `format.branch_name`.
        names: our names of all branch weights of the model.

    Raises:
        ConversionError: some are missing, or there are some that the model has no place for.
    """
    ours = {official_name(name, config.branch_depth): name for name in names}
    place = f"{source} (K={config.branch_layer}, T={config.branch_depth}, gate: {config.has_gate})"
    missing = sorted(ours.keys() - branches.keys())
    if missing:
        raise ConversionError(f"{place} lacks branch weights: {_some(missing)}.")
    unexpected = sorted(name for name in branches.keys() - ours.keys() if not is_unused(name, config))
    if unexpected:
        raise ConversionError(f"{place} holds branch weights that belong to no layer: {_some(unexpected)}.")
    return {ours[name]: branches[name] for name in ours}


def _pad_rows(weight: Tensor, rows: int) -> Tensor:
    """Repeats the mean row below, whose logit can never be the largest."""
    extra = weight.float().mean(0, keepdim=True).to(weight.dtype).expand(rows - len(weight), -1)
    return torch.cat([weight, extra])


def fit_vocabulary(weights: dict[str, Any], config: QZoomConfig) -> None:
    """Gives the image token of LLaVA-1.5 a row: the original vocabulary ends just before it.

    Changes `weights` and the vocabulary size in `config`.
    """
    sizes = {name: weights[name].get_shape()[0] for name in _EMBEDDINGS if name in weights}
    rows = max(sizes.values(), default=config.get_text_config().vocab_size)
    if config.image_token_id >= rows:
        rows = config.image_token_id + _VOCABULARY_STEP
    for name, size in sizes.items():
        if size < rows:
            weights[name] = _pad_rows(weights[name][...], rows)
    config.get_text_config().vocab_size = rows


def _split_weights(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights of the VLM under transformers' names, branch weights by `format.branch_name`) of a folder."""
    vlm, branches = {}, {}
    for key, weight in read_weights(source).items():
        name = branch_name(key)
        if name is None:
            vlm[vlm_name(key)] = weight
        else:
            branches[name] = weight
    return vlm, branches


def _complete_vlm(vlm: dict[str, Any], config: QZoomConfig, base: Path | None) -> dict[str, Any]:
    """The VLM's weights with those that only its plain model has, in a vocabulary with a row for the image token."""
    if base is not None:
        vlm = {vlm_name(key): weight for key, weight in read_weights(base).items()} | vlm
    if config.tie_word_embeddings:
        vlm.pop("lm_head.weight", None)
    if not config.backbone.grid.has_budget:
        fit_vocabulary(vlm, config)
    return vlm


def _check_vlm(source: Path, vlm: dict[str, Any], config: QZoomConfig, names: list[str], base: Path | None) -> None:
    """Refuses a VLM without all of its weights.

    Args:
        names: our names of all weights of the model.
    """
    needed = {name.removeprefix("vlm.") for name in names if name.startswith("vlm.")}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = sorted(needed - vlm.keys() - optional)
    if missing:
        hint = (
            f"{base} lacks them too."
            if base is not None
            else "Outputs of SD-RPN's training end above the branch; name the plain VLM's folder with --base."
        )
        raise ConversionError(f"{source} lacks weights of the VLM: {_some(missing)}. {hint}")


def load_model(source: Path, base: Path | None) -> QZoomForConditionalGeneration:
    """The model of a folder in the authors' format; weights are read once, straight into it.

    Args:
        source: folder in the authors' format.
        base: folder of the plain VLM that supplies missing weights.

    Raises:
        ConversionError: something is missing or of an unknown kind.
    """
    vlm, branches = _split_weights(source)
    config = qzoom_config(source, set(branches), base)
    if not vlm:
        raise ConversionError(f"{source} holds no weights but those of the branches.")
    config.dtype = next(iter(vlm.values()))[...].dtype
    vlm = _complete_vlm(vlm, config, base)
    with torch.device("meta"):
        names = list(QZoomForConditionalGeneration(config).state_dict())
    zoom = translate_branches(source, branches, config, [name for name in names if name.startswith("zoom.")])
    _check_vlm(source, vlm, config, names, base)
    try:
        model = QZoomForConditionalGeneration.from_pretrained(
            None, config=config, state_dict={**vlm, **zoom}, dtype=config.dtype
        )
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"{source}: {error}") from error
    for folder in filter(None, (source, base)):
        if read_json(folder, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
            break
    return model


def convert(source: Path, output: Path, base: Path | None = None) -> QZoomForConditionalGeneration:
    """Writes a full Q-Zoom checkpoint, with a processor where there is one, and returns the model.

    Args:
        source: folder in the authors' format.
        output: folder to write, absent or empty.
        base: folder of the plain VLM, for what `source` lacks.

    Raises:
        ConversionError: bad source or base, or an output folder that is not empty.
    """
    for folder in filter(None, (source, base)):
        if not folder.is_dir():
            raise ConversionError(f"{folder} is not a folder.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not an empty folder; choose another one.")
    model = load_model(source, base)
    processors = (build_processor(folder, model.config) for folder in filter(None, (source, base)))
    processor = next(filter(None, processors), None)
    model.save_pretrained(output)
    if processor is not None:
        processor.save_pretrained(output)
    else:
        copy_matching(source, TOKENIZER_FILES, output)
    return model


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder in the authors' format")
    parser.add_argument("output", type=Path, help="folder to write; absent or empty")
    parser.add_argument("--base", type=Path, help="folder of the plain VLM, for weights that SOURCE lacks")
    parsed = parser.parse_args(arguments)
    try:
        model = convert(parsed.source, parsed.output, parsed.base)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    config = model.config
    print(
        f"wrote {parsed.output}: {config.vlm_config.model_type}, K={config.branch_layer}, T={config.branch_depth}, "
        f"gate: {'yes' if config.has_gate else 'no'}, positions: {config.position_alignment or 'sequential'}, "
        f"coarse view: {config.min_tokens or 'fixed'}-{config.max_tokens or 'fixed'} tokens"
    )
    if not (parsed.output / "processor_config.json").exists():
        print("no processor: SOURCE lacks a tokenizer or preprocessor_config.json; --base may supply both.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
