"""The model card: what its author wrote, and around it what the repository's own files say.

`read_card` takes a card apart, `render` puts one together. Sections that this module writes are written anew each
time; everything else in a card (title, introduction, other sections, entries of the head) is kept. So a card is right
exactly if rendering it once more changes nothing, which is what `stale_sections` tells. Standard library only.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hub_release.card.tables import figure_table, page_kind_table, spread_table, times_table
from hub_release.card.texts import (
    CITATION,
    DEFAULT_LIMITS,
    FIGURE_NAMES,
    FOUR_BIT,
    FOUR_BIT_STORED,
    OVERLAY,
    PIN,
    PIPELINE,
    QUICK_START,
    UNKNOWN_TRAINING,
    VISION,
)
from hub_release.repository.errors import BuildError
from hub_release.repository.files import BASE_LICENCE, EVALUATION, FIGURE_KINDS, files_of, is_repository, read_json
from hub_release.repository.tensors import stored_tensors, tensor_bytes, variant_of


LIBRARY, TASK, TAG = "transformers", "image-text-to-text", "q-zoom"
RELATIONS = {"full": "finetune", "addon": "adapter", "4bit": "quantized", "8bit": "quantized"}
HISTORY, LIMITS = "How it was trained", "Limits"
_AFTER_HISTORY = ("Training time", LIMITS)
_LAST = ("Pin a revision", "Licence", "Citation")


@dataclass
class Card:
    """A card in parts.

    Args:
        head: Entries of the YAML head by key, each with its whole text.
        title: First heading.
        introduction: What stands before the first section.
        sections: Text by heading, in order.
    """

    head: dict[str, str] = field(default_factory=dict)
    title: str = ""
    introduction: str = ""
    sections: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What a repository's files say about it.

    Args:
        config: Content of config.json.
        variant: See `repository.variant_of`.
        weight_files, weight_bytes: How many files hold the weights, and the size of the weights in them.
        figures: By kind ("figures", "shifted", "seeds", "times") what was measured.
        base_licences: Names of the base model's licence files.
        repository: Name under which the card's examples load it.
    """

    config: dict[str, Any]
    variant: str
    weight_files: int
    weight_bytes: int
    figures: dict[str, Any]
    base_licences: tuple[str, ...]
    repository: str

    @property
    def base(self) -> str | None:
        """The base model's repository; None where the config names none that others can reach."""
        name = self.config.get("base_model_name_or_path")
        return name if is_repository(name) else None


def read_facts(folder: Path, repository: str) -> Facts:
    """Reads them off a folder.

    Raises:
        BuildError: configuration, weights or figures are missing or damaged.
    """
    config, tensors = read_json(folder / "config.json"), stored_tensors(folder)
    paths = {kind: folder / EVALUATION / f"{kind}.json" for kind in FIGURE_KINDS}
    return Facts(
        config=config,
        variant=variant_of(config, tensors),
        weight_files=len({tensor.file for tensor in tensors.values()}),
        weight_bytes=tensor_bytes(tensors),
        figures={kind: read_json(path) for kind, path in paths.items() if path.exists()},
        base_licences=tuple(name for name in files_of(folder) if name.startswith(BASE_LICENCE)),
        repository=repository,
    )


# --- taking apart ----------------------------------------------------------------------------------------------------


def read_card(text: str) -> Card:
    """The parts of a card; any Markdown will do."""
    card = Card()
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match:
        text = text[match.end() :]
        for entry in re.split(r"\n(?=[A-Za-z_])", match[1].strip("\n")):
            card.head[entry.partition(":")[0].strip()] = entry
    heading, held, fenced = None, {None: []}, False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and line.startswith("# ") and not card.title:
            card.title = line[2:].strip()
        elif not fenced and line.startswith("## "):
            heading = line[3:].strip()
            held.setdefault(heading, [])
        else:
            held[heading].append(line)
    card.introduction = "\n".join(held.pop(None)).strip()
    card.sections = {name: "\n".join(lines).strip() for name, lines in held.items()}
    return card


def repository_of(card: Card) -> str | None:
    """The name that the card's quick start loads."""
    match = re.search(r'^name = "(.*)"', card.sections.get("Quick start", ""), re.MULTILINE)
    return match[1] if match else None


def rename(text: str, repository: str) -> str:
    """The card's text with examples that load `repository`."""
    own = repository_of(read_card(text))
    return text if own is None else text.replace(f'name = "{own}"', f'name = "{repository}"')


# --- putting together ------------------------------------------------------------------------------------------------


def _head(own: dict[str, str], facts: Facts, licence: str | None) -> str:
    tags = [TAG, *(("bitsandbytes", facts.variant.replace("bit", "-bit")) if "bit" in facts.variant else ())]
    tags += re.findall(r"[\w.:+-]+", own.get("tags", "").partition(":")[2].replace("\n- ", " ").replace("\n  - ", " "))
    entries = dict(own)
    entries |= {"library_name": f"library_name: {LIBRARY}", "pipeline_tag": f"pipeline_tag: {TASK}"}
    if licence is not None:
        entries["license"] = f"license: {json.dumps(licence)}"
    if facts.base is not None:
        entries["base_model"] = f"base_model: {facts.base}"
        entries["base_model_relation"] = f"base_model_relation: {RELATIONS[facts.variant]}"
    entries["tags"] = f"tags: [{', '.join(dict.fromkeys(tags))}]"
    return "---\n" + "\n".join(entries.values()) + "\n---"


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
        "coarse view": coarse,
        "crop": _budget(config.get("crop_min_tokens"), config.get("crop_max_tokens"), "as the coarse view"),
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
    held = facts.figures
    if "figures" not in held:
        return "None: nothing has been measured with this checkpoint."
    parts = []
    if facts.variant != "full":
        other = "before it was quantized" if "bit" in facts.variant else "with its VLM in one folder"
        parts.append(f"Measured with the full checkpoint, {other}; not measured again in this form.")
    try:
        parts.append(figure_table(held["figures"], held.get("shifted")))
        parts.append(FIGURE_NAMES if "fine_accuracy_zoom" in held["figures"]["summary"] else None)
        parts.append(page_kind_table(held["figures"]))
        parts.append(spread_table(held["seeds"]) if "seeds" in held else None)
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


def render(card: Card, facts: Facts, licence: str | None = None) -> str:
    """The whole card.

    Args:
        card: What its author wrote; sections that this module writes are replaced.
        licence: Identifier of the weights' licence; by default what the head says.
    """
    ours = own_sections(facts)
    kept = {heading: text for heading, text in card.sections.items() if heading not in (*ours, "Training time")}
    history, limits = kept.pop(HISTORY, UNKNOWN_TRAINING), kept.pop(LIMITS, DEFAULT_LIMITS)
    first = {heading: text for heading, text in ours.items() if heading not in (*_AFTER_HISTORY, *_LAST)}
    sections = {**first, HISTORY: history, "Training time": ours.get("Training time", ""), LIMITS: limits, **kept}
    sections |= {heading: ours[heading] for heading in _LAST}
    family = facts.config["vlm_config"]["model_type"]
    introduction = card.introduction or (
        f"Q-Zoom on a {family} model: it looks at an image coarsely, decides per question whether that is enough, and "
        "if not, answers from a crop of the original image as well."
    )
    title = card.title or facts.repository.rpartition("/")[2]
    parts = [f"{_head(card.head, facts, licence)}\n\n# {title}", introduction]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def stale_sections(text: str, facts: Facts) -> list[str]:
    """What a card says otherwise than the files beside it, one sentence a section."""
    card, wrong = read_card(text), []
    ours = own_sections(facts)
    for heading, expected in ours.items():
        said = card.sections.get(heading)
        if said is None:
            wrong.append(f"the card has no section '{heading}'")
            continue
        if said != expected:
            lines = ([line for line in text.splitlines() if line.strip()] for text in (said, expected))
            pairs = zip_longest(*lines, fillvalue="nothing more")
            left, right = next((pair for pair in pairs if pair[0] != pair[1]), ("other empty lines", ""))
            wrong.append(f"the card's section '{heading}' is stale: it says {left!r}, the files say {right!r}")
    if "Training time" in card.sections and "Training time" not in ours:
        wrong.append(f"the card states training times, but there is no {EVALUATION}/times.json")
    return wrong + [f"the card has no section '{name}'" for name in (HISTORY, LIMITS) if name not in card.sections]
