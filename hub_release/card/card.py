"""The model card: what its author wrote, and around it what the repository's own files say.

Sections that `sections` writes are written anew each time; everything else in a card (title, introduction, other
sections, entries of the head) is kept. So a card is right exactly if rendering it once more changes nothing, which is
what `stale_sections` tells. Standard library only.
"""

import json
import re
from itertools import zip_longest

from hub_release.card.facts import Facts
from hub_release.card.parts import Card, compose, read_card
from hub_release.card.sections import own_sections
from hub_release.card.texts import DEFAULT_LIMITS, UNKNOWN_TRAINING
from hub_release.repository.files import EVALUATION


LIBRARY, TASK, TAG = "transformers", "image-text-to-text", "q-zoom"
RELATIONS = {"full": "finetune", "addon": "adapter", "4bit": "quantized", "8bit": "quantized"}
HISTORY, LIMITS = "How it was trained", "Limits"
_AFTER_HISTORY = ("Training time", LIMITS)
_LAST = ("Pin a revision", "Licence", "Citation")


def _head(own: dict[str, str], facts: Facts, licence: str | None) -> dict[str, str]:
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
    return entries


def render(card: Card, facts: Facts, licence: str | None = None) -> str:
    """The whole card.

    Args:
        card: what its author wrote; sections that this module writes are replaced.
        licence: identifier of the weights' licence; by default what the head says.
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
    sections = {heading: text for heading, text in sections.items() if text}
    return compose(Card(_head(card.head, facts, licence), title, introduction, sections))


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
