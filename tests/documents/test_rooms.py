"""The order of the rooms: imports obey the map in CONTRIBUTING, and nothing imports in a circle.

Without it a reader of one file would have to read them all. Imports inside functions count like any other.
"""

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "modeling_qzoom"
OURS = (PACKAGE, "hub_release")
MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# a line of the map: names in backquotes, a colon, what they are for
ENTRY = re.compile(r"- ((?:`[^`]+`(?:, )?)+): \S")
TRAINING_ENTRIES = 9

# imported modules by module
Arrows = dict[str, set[str]]
# names of entries from low to high; those of one line are side by side
Levels = list[list[str]]


# --- the map ---------------------------------------------------------------------------------------------------------


def levels(text: str, heading: str) -> Levels:
    """The entries below a heading of the map, up to the next heading."""
    lines = iter(text.splitlines())
    assert any(line.strip("# ") == heading for line in lines if line.startswith("#")), f"the map has no {heading!r}"
    entries: Levels = []
    for line in lines:
        if line.startswith("#"):
            break
        if line.startswith("- "):
            match = ENTRY.match(line)
            assert match, f"{line!r} is no entry of the map: write - `name`: what it is for"
            entries.append(re.findall("`([^`]+)`", match[1]))
    return entries


def disagreements(entries: Levels, existing: set[str]) -> list[str]:
    """What the map lacks, holds twice or holds without its being there."""
    names = [name for level in entries for name in level]
    return [
        *(f"the map lacks {name}" for name in sorted(existing - set(names))),
        *(f"the map names {name}, which is not there" for name in sorted(set(names) - existing)),
        *(f"the map names {name} more than once" for name in sorted(set(names)) if names.count(name) > 1),
    ]


# --- the imports -----------------------------------------------------------------------------------------------------


def modules(root: Path) -> dict[str, Path]:
    """Our modules by their dotted names; a package goes by its folder's."""
    paths = [path for top in OURS for path in sorted((root / top).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported_names(source: str, package: list[str]) -> Iterator[str]:
    """Dotted names of everything that a source imports, relative imports resolved.

    Args:
        package: parts of the name of the package that the source belongs to.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def arrows(paths: dict[str, Path]) -> Arrows:
    """Which of our modules each of them imports."""
    result: Arrows = {}
    for name, path in paths.items():
        parts, targets = name.split("."), set()
        package = parts if path.stem == "__init__" else parts[:-1]
        for imported in imported_names(path.read_text(encoding="utf-8"), package):
            target = imported.split(".")
            while target and ".".join(target) not in paths:  # the end may be a class or a function
                target.pop()
            targets.add(".".join(target))
        result[name] = targets - {"", name}
    return result


def circle(graph: Arrows) -> list[str]:
    """Modules that import each other in a circle, empty if none do."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def upward(graph: Arrows, entries: Levels, place: Callable[[str], str | None]) -> list[str]:
    """The imports that do not lead to a lower level.

    Args:
        place: entry of the map that a module belongs to; what is on none of the levels is left out.
    """
    height = {name: index for index, level in enumerate(entries) for name in level}
    return [
        f"{source} imports {target}"
        for source, targets in sorted(graph.items())
        for target in sorted(targets)
        if (low := place(target)) != (high := place(source))
        and low in height
        and high in height
        and height[low] >= height[high]
    ]


# --- our places ------------------------------------------------------------------------------------------------------


MODULES = modules(ROOT)
ARROWS = arrows(MODULES)


def published(name: str) -> str | None:
    """A published file's entry."""
    path = MODULES[name].relative_to(ROOT)
    return path.stem if path.parent == Path(PACKAGE) else None


def room(name: str) -> str:
    """The room of a module; all published files are one."""
    folders = MODULES[name].relative_to(ROOT).parts[:-1]
    if folders[0] != PACKAGE:
        return f"{folders[0]}/"
    return f"{folders[1]}/" if len(folders) > 1 else "published"


def training_folder(name: str) -> str | None:
    """The folder of a module of `training/`; what lies in none of them is above all of them."""
    folders = MODULES[name].relative_to(ROOT).parts[:-1]
    if folders[:2] != (PACKAGE, "training"):
        return None
    return f"{folders[2]}/" if len(folders) > 2 else "itself"


def serving_file(name: str) -> str | None:
    """A module of `serving/`."""
    path = MODULES[name].relative_to(ROOT)
    return path.stem if path.parent == Path(PACKAGE) / "serving" and path.stem != "__init__" else None


FILES = levels(MAP, "Published")
ROOMS = [["published"], *levels(MAP, "Not published")]
TRAINING = [*levels(MAP, "Inside training"), ["itself"]]
SERVING = levels(MAP, "Inside serving")


def test_nothing_imports_in_a_circle():
    assert circle(ARROWS) == []


def test_every_published_file_stands_on_the_map_once():
    assert disagreements(FILES, {path.stem for path in (ROOT / PACKAGE).glob("*.py")}) == []


def test_published_files_import_only_what_stands_above_them():
    assert upward(ARROWS, FILES, published) == []


def test_every_room_stands_on_the_map_once():
    assert disagreements(ROOMS, {room(name) for name in MODULES}) == []
    assert disagreements(TRAINING, {folder for name in MODULES if (folder := training_folder(name))}) == []
    assert disagreements(SERVING, {file for name in MODULES if (file := serving_file(name))}) == []


def test_rooms_import_only_from_rooms_below_them():
    assert upward(ARROWS, ROOMS, room) == []
    assert upward(ARROWS, TRAINING, training_folder) == []
    assert upward(ARROWS, SERVING, serving_file) == []


def test_the_top_floor_of_training_is_seen_at_a_glance():
    entries = [path.name for path in (ROOT / PACKAGE / "training").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= TRAINING_ENTRIES, sorted(entries)


# --- the checks themselves -------------------------------------------------------------------------------------------


def test_the_map_is_read_by_its_entries():
    text = "## Map\n- `z`: no\n### A\ntext\n- `x`: one\n\nmore\n- `y`, `v/`: two\n### B\n- `w`: three\n"
    assert levels(text, "A") == [["x"], ["y", "v/"]] and levels(text, "B") == [["w"]]
    with pytest.raises(AssertionError, match="no entry of the map"):
        levels("### A\n- x: one\n", "A")
    with pytest.raises(AssertionError, match="no 'C'"):
        levels(text, "C")
    assert disagreements([["x"], ["x", "y"]], {"x", "z"}) == [
        "the map lacks z",
        "the map names y, which is not there",
        "the map names x more than once",
    ]


@pytest.mark.parametrize(
    "source, imported",
    [
        ("from .a_qzoom import b", "p.q.a_qzoom.b"),
        ("from ..r import b", "p.r.b"),
        ("from ... import b", "b"),
        ("from . import b", "p.q.b"),
        ("import p.r.b as c", "p.r.b"),
        ("def f():\n    from p.r import b", "p.r.b"),
    ],
)
def test_imports_of_every_form_are_resolved(source, imported):
    assert list(imported_names(source, ["p", "q"])) == [imported]


def test_circles_and_arrows_that_run_up_are_found(tmp_path):
    for name, source in {
        "__init__": "from .b_qzoom import B",
        "a_qzoom": "def late():\n    from .room.c import C",
        "b_qzoom": "from .a_qzoom import A",
        "room.__init__": "",
        "room.c": "from .. import B",
    }.items():
        path = tmp_path.joinpath(PACKAGE, *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    graph = arrows(modules(tmp_path))
    files = {f"{PACKAGE}.a_qzoom": "a", f"{PACKAGE}.b_qzoom": "b"}
    assert set(circle(graph)) == {PACKAGE, *files, f"{PACKAGE}.room.c"}
    assert upward(graph, [["a"], ["b"]], files.get) == []
    assert upward(graph, [["b"], ["a"]], files.get) == [f"{PACKAGE}.b_qzoom imports {PACKAGE}.a_qzoom"]
    assert upward(graph, [["a", "b"]], files.get) != []  # side by side
