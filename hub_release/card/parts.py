"""A model card in parts: head, title, introduction and sections. Standard library only."""

import re
from dataclasses import dataclass, field


@dataclass
class Card:
    """A card in parts.

    Attributes:
        head: entries of the YAML head by key, each with its whole text.
        title: first heading.
        introduction: what stands before the first section.
        sections: text by heading, in order.
    """

    head: dict[str, str] = field(default_factory=dict)
    title: str = ""
    introduction: str = ""
    sections: dict[str, str] = field(default_factory=dict)


def read_card(text: str) -> Card:
    """The parts of a card; any Markdown will do."""
    card = Card()
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match:
        text = text[match.end() :]
        for entry in re.split(r"\n(?=[A-Za-z_])", match[1].strip("\n")):
            card.head[entry.partition(":")[0].strip()] = entry
    introduction: list[str] = []
    sections: dict[str, list[str]] = {}
    lines, fenced = introduction, False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and line.startswith("# ") and not card.title:
            card.title = line[2:].strip()
        elif not fenced and line.startswith("## "):
            lines = sections.setdefault(line[3:].strip(), [])
        else:
            lines.append(line)
    card.introduction = "\n".join(introduction).strip()
    card.sections = {heading: "\n".join(lines).strip() for heading, lines in sections.items()}
    return card


def compose(card: Card) -> str:
    """The text of a card, which `read_card` takes apart again."""
    head = "\n".join(["---", *card.head.values(), "---\n\n"]) if card.head else ""
    parts = [f"{head}# {card.title}", card.introduction]
    parts += [f"## {heading}\n\n{text}" for heading, text in card.sections.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def repository_of(card: Card) -> str | None:
    """The name that the card's quick start loads."""
    match = re.search(r'^name = "(.*)"', card.sections.get("Quick start", ""), re.MULTILINE)
    return match[1] if match else None


def rename(text: str, repository: str) -> str:
    """The card's text with examples that load `repository`."""
    own = repository_of(read_card(text))
    return text if own is None else text.replace(f'name = "{own}"', f'name = "{repository}"')
