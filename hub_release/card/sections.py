"""The sections of a model card that a repository's own files decide. Standard library only."""

import json
from typing import Any

from hub_release.card.facts import Facts
from hub_release.card.tables import figure_table, page_kind_table, spread_table, times_table
from hub_release.card.texts import (
    CITATION,
    FIGURE_NAMES,
    FOUR_BIT,
    FOUR_BIT_STORED,
    OVERLAY,
    PIN,
    PIPELINE,
    QUICK_START,
    VISION,
)
from hub_release.repository.errors import BuildError


def _contents(facts: Facts) -> str:
    config = facts.config
    size = f"{facts.weight_bytes / 1e6:,.1f} MB of weights in {facts.weight_files} safetensors file"
    size += "s" if facts.weight_files > 1 else ""
    if facts.variant == "addon":
        revision = config.get("base_model_revision")
        at = f" at revision `{revision}`" if revision else ""
        lora = ", and a LoRA adapter of its decoder in `lora/` (needs `peft`)" if config.get("lora_subfolder") else ""
        return (
            f"An add-on: the two branches that Q-Zoom adds{lora}; {size}, {config.get('dtype')}. The VLM comes from "
            f"`{config.get('base_model_name_or_path')}`{at}, which loading fetches by itself."
        )
    if facts.variant == "full":
        return f"The whole model, VLM and branches: {size}, {config.get('dtype')}."
    recipe = config["quantization_config"]
    kind = "8 bit"
    if facts.variant == "4bit":
        twice = " with double quantization" if recipe.get("bnb_4bit_use_double_quant") else ""
        kind = f"4 bit ({recipe.get('bnb_4bit_quant_type')}{twice})"
    kept = ", ".join(f"`{name}`" for name in recipe.get("llm_int8_skip_modules") or ())
    return (
        f"The whole model, VLM and branches, stored in {kind} by bitsandbytes: {size}. Not quantized are {kept}. It "
        "loads as below and needs `pip install accelerate bitsandbytes`."
    )


_RULES = {"need": ", by need", "visionrl2": ", by need as in Vision-RL²"}


def _crop(config: dict[str, Any]) -> str:
    """The crop's budget, and the rule that sizes a crop within it."""
    rule = config.get("crop_budget", "fixed")
    low, target, high = (config.get(f"crop_{name}_tokens") for name in ("min", "target", "max"))
    if rule == "fixed":
        return _budget(low, high, "as the coarse view")
    bounds = [f"{name} {bound}" for name, bound in (("floor", low), ("target", target), ("cap", high)) if bound]
    return f"{', '.join(bounds) or 'bounds from the coarse view'}{_RULES[rule]}"


def _region_rules(config: dict[str, Any]) -> dict[str, str]:
    """Rules for the heat map, where they are not the usual ones."""
    minima = {"peak": config.get("region_min_peak"), "peak over mean": config.get("region_min_contrast")}
    rows = {f"smallest {name} of the heat map": str(value) for name, value in minima.items() if value}
    if config.get("region_blur", "fixed") != "fixed":
        rows["blur of the heat map"] = "wider on larger grids"
    return rows


def _budget(low: int | None, high: int | None, otherwise: str) -> str:
    return otherwise if low is None and high is None else f"{low} to {high} tokens"


def _settings(facts: Facts) -> str:
    config, vlm = facts.config, facts.config["vlm_config"]
    text = vlm.get("text_config") or {}
    peak = " of the map's peak" if config.get("region_threshold_mode") == "peak" else ""
    gate = f"zooms from probability {config.get('gate_threshold')} on" if config.get("has_gate", True) else "none"
    coarse = _budget(config.get("min_tokens"), config.get("max_tokens"), "as the image processor is set")
    rows = {
        "VLM": f"{vlm['model_type']}, {text.get('num_hidden_layers')} decoder layers of {text.get('hidden_size')}",
        "K (the branches read what this decoder layer receives)": config["branch_layer"],
        "T (layers of a branch)": config["branch_depth"],
        "gate": gate,
        "region threshold": f"{config.get('region_threshold')}{peak}",
        **_region_rules(config),
        "coarse view": coarse,
        "crop": _crop(config),
        "positions of crop tokens": config.get("position_alignment") or "the VLM's default",
        "saved with transformers": config.get("transformers_version"),
    }
    lines = ["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if config.get("presets"):
        lines += ["", '| preset (`effort="…"`) | sets |', "|---|---|"]
        for name, options in config["presets"].items():
            lines.append(f"| {name} | {', '.join(f'{key} {value}' for key, value in options.items())} |")
    return "\n".join(lines)


def _figures(facts: Facts) -> str:
    measured = facts.figures
    if "figures" not in measured:
        return "None: nothing has been measured with this checkpoint."
    parts: list[str | None] = []
    if facts.variant != "full":
        other = "before it was quantized" if "bit" in facts.variant else "with its VLM in one folder"
        parts.append(f"Measured with the full checkpoint, {other}; not measured again in this form.")
    try:
        parts.append(figure_table(measured["figures"], measured.get("shifted")))
        parts.append(FIGURE_NAMES if "fine_accuracy_zoom" in measured["figures"]["summary"] else None)
        parts.append(page_kind_table(measured["figures"]))
        parts.append(spread_table(measured["seeds"]) if "seeds" in measured else None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BuildError(
            f"the figures are not in the form that `python -m modeling_qzoom.evaluation` writes: {error!r}"
        ) from error
    return "\n\n".join(part for part in parts if part)


def _licence(facts: Facts) -> str:
    text = "Code: Apache-2.0 (`LICENSE`, `NOTICE`). Weights: as `license` at the top of this card says."
    if facts.base_licences:
        text += f" Terms of the base model: {', '.join(f'`{name}`' for name in facts.base_licences)}."
    elif facts.base:
        text += f" The terms of the base model, `{facts.base}`, hold as well."
    return text


def own_sections(facts: Facts) -> dict[str, str]:
    """Every section that this module writes, by heading."""
    name = facts.repository
    vision = VISION.get(facts.config["vlm_config"]["model_type"], ["model.visual"])
    sections = {
        "What is here": _contents(facts),
        "Quick start": QUICK_START.format(name=name),
        "Pipeline": PIPELINE,
        "In 4 bit": FOUR_BIT_STORED if "bit" in facts.variant else FOUR_BIT.format(vision=json.dumps(vision)),
        "See where it looked": OVERLAY,
        "Settings": _settings(facts),
        "Figures": _figures(facts),
        "Training time": times_table(facts.figures["times"]) if "times" in facts.figures else "",
        "Pin a revision": PIN,
        "Licence": _licence(facts),
        "Citation": CITATION,
    }
    return {heading: text for heading, text in sections.items() if text}
