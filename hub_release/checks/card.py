"""Whether a repository's card has all of its metadata, and says what the files beside it say."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hub_release.card.card import HISTORY, LIBRARY, TAG, TASK, stale_sections
from hub_release.card.facts import read_facts
from hub_release.card.parts import read_card, repository_of
from hub_release.repository.errors import BuildError
from hub_release.repository.files import BASE_LICENCE, EVALUATION, files_of, is_repository, read_json


_HEADER_KEYS = ("library_name", "pipeline_tag", "license", "tags")


def _read_head(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise BuildError(f"README.md: the head is not YAML: {error}") from error
    if not isinstance(head, dict):
        raise BuildError("README.md begins with no YAML head")
    return head


def _check_entries(head: dict[str, Any]) -> Iterator[str]:
    """The entries that every card has."""
    yield from (f"README.md: the head has no {key}" for key in _HEADER_KEYS if not head.get(key))
    for key, expected in (("library_name", LIBRARY), ("pipeline_tag", TASK)):
        if head.get(key) and head[key] != expected:
            yield f"README.md: {key} is {head[key]!r} instead of {expected!r}"
    if head.get("tags") and TAG not in head["tags"]:
        yield f"README.md: the tags lack {TAG!r}"
    if head.get("license") == "other" and not (head.get("license_name") and head.get("license_link")):
        yield "README.md: the license 'other' needs license_name and license_link"


def _check_base(head: dict[str, Any], folder: Path, base: str) -> Iterator[str]:
    """What a card says about the base model, and that its licence is there."""
    if head.get("base_model") != base:
        yield f"README.md: base_model is {head.get('base_model')!r}, config.json says {base!r}"
    if not head.get("base_model_relation"):
        yield "README.md: the head has no base_model_relation"
    if not any(name.startswith(f"{BASE_LICENCE}LICEN") for name in files_of(folder)) and not head.get("license_link"):
        yield (
            "the base model's licence is missing; build with --base-folder FOLDER, or put license_link into the head "
            "of the checkpoint's card"
        )


def _check_conditions(folder: Path, conditions: dict[str, Any]) -> Iterator[str]:
    """Figures that were measured with other thresholds or budgets are another checkpoint's."""
    if conditions.get("effort") is not None or "--option" in conditions.get("command", ""):
        return
    config, processor = read_json(folder / "config.json"), read_json(folder / "processor_config.json")
    coarse = [processor.get("min_tokens"), processor.get("max_tokens")]
    here = {
        "gate_threshold": config.get("gate_threshold") if config.get("has_gate", True) else None,
        "region_threshold": [config.get("region_threshold"), config.get("region_threshold_mode")],
        "crop_rule": config.get("crop_budget", "fixed"),
        "region_rules": [
            config.get(name, usual)
            for name, usual in (("region_blur", "fixed"), ("region_min_peak", 0.0), ("region_min_contrast", 0.0))
        ],
        "coarse_budget": None if None in coarse else coarse,
    }
    for name, value in here.items():
        if name in conditions and value is not None and conditions[name] != value:
            yield (
                f"{EVALUATION}/figures.json is stale: it was measured with {name} {conditions[name]}, the checkpoint "
                f"has {value}"
            )


def check_card(folder: Path) -> Iterator[str]:
    """Metadata complete, and every fact in the card what the files say."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    config = read_json(folder / "config.json")
    try:
        head = _read_head(text)
    except BuildError as error:
        yield str(error)
        return
    yield from _check_entries(head)
    base: str = config.get("base_model_name_or_path") or ""
    if is_repository(base):
        yield from _check_base(head, folder, base)
    name = repository_of(read_card(text))
    if name is None:
        yield f"README.md has no quick start that loads a repository; sections up to '{HISTORY}' are made by build.py"
        return
    facts = read_facts(folder, name)
    yield from (f"README.md: {sentence}; build again" for sentence in stale_sections(text, facts))
    if "figures" in facts.figures:
        yield from _check_conditions(folder, facts.figures["figures"].get("conditions", {}))
