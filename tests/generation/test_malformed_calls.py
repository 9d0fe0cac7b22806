"""Freshly drawn malformed calls of `generate`, `forward` and the processor: each error names the cause.

The draws are seeded by the environment variable MALFORMED_CALLS_SEED, so that a failure can be drawn again.
"""

import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

import modeling_qzoom
from tests.families import FAMILY
from tests.generation_fixtures import shared_model
from tests.processing_fixtures import PROCESSORS
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs


SEED = int(os.environ.get("MALFORMED_CALLS_SEED", "20"))
CALLS = 500
OURS = str(Path(modeling_qzoom.__file__).parent)
# argument checks of transformers itself, whose sentences are the ones that users of the plain model know
THEIRS = ("_validate_model_kwargs", "validate", "_validate_generation_mode", "_validate_generated_length", "_missing_")


@dataclass
class Draw:
    """One malformed call.

    Attributes:
        target: `generate`, `forward` or `processor`.
        family: of the model or processor.
        name: what is wrong with it.
        call: makes the call.
    """

    target: str
    family: str
    name: str
    call: Callable[[], Any]


def _typo(rng: random.Random, name: str) -> str:
    """The name with a letter left out, doubled or swapped with the next."""
    place = rng.randrange(1, len(name) - 2)
    kind = rng.choice(["drop", "double", "swap"])
    if kind == "swap" and name[place] != name[place + 1]:
        return name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    if kind == "drop":
        return name[:place] + name[place + 1 :]
    return name[:place] + name[place] + name[place:]


def _junk(rng: random.Random) -> Any:
    return rng.choice(["x", -1, 2.5, [], {}, object(), float("nan"), b"1", (1, 2), complex(1, 1)])


def _rows(rng: random.Random) -> list[Row]:
    """One to three rows, the first with an image that is not square."""
    grids = [(2, 3), (3, 5), (4, 2), (1, 4)]
    rows = [Row(["a" * rng.randrange(1, 9), None, " b?"], [rng.choice(grids)], rng.randrange(1000))]
    for _ in range(rng.randrange(3)):
        if rng.random() < 0.6:
            rows.append(Row(["c ", None, "d" * rng.randrange(1, 9)], [rng.choice(grids)], rng.randrange(1000)))
        else:
            rows.append(Row(["words" * rng.randrange(1, 4)], [], 0))
    return rows


OPTIONS = ("zoom", "effort", "gate_threshold", "region_threshold", "region_threshold_mode", "position_alignment")
OPTIONS += ("crop_budget", "region_blur", "region_min_peak", "region_min_contrast")
BAD_OPTIONS: dict[str, list[Any]] = {
    "zoom": ["Auto", True, 1, ["auto"], b"never"],
    "effort": ["fastest", 3, ["fast"], True],
    "gate_threshold": [-1, -1e-9, float("nan"), float("inf"), "0.5", True, [0.5], 10**400],
    "region_threshold": [-0.5, float("nan"), float("-inf"), "0.1", False, {}, -(10**400)],
    "region_threshold_mode": ["Peak", "relative", 0, True],
    "position_alignment": ["nested", 1, ["sequential"]],
    "crop_min_tokens": [0, -4, 2.0, "8", True, 4097, 10**9],
    "crop_max_tokens": [0, -4, 2.5, "8", False, 5000, 10**400],
    "crop_target_tokens": [0, -4, 2.5, "8", True, 5000, 10**400, 8],  # 8 has no effect beside a fixed budget
    "crop_budget": ["Need", True, 64, ["need"]],
    "region_blur": ["auto", 2.0, True],
    "region_min_peak": [-0.1, float("nan"), "0.1", True, 10**400],
    "region_min_contrast": [-1, float("inf"), "3", False, {}],
    "return_zoom_reports": ["yes", 1, 0, [True]],
}


def bad_option(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A bad value, in the call or in its generation config."""
    name = rng.choice(list(BAD_OPTIONS))
    value = rng.choice(BAD_OPTIONS[name])
    if rng.random() < 0.5:
        return f"{name} in the call", {name: value}
    return f"{name} in a generation config", {"generation_config": GenerationConfig(**{name: value})}


def misspelt_option(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name = _typo(rng, rng.choice([*OPTIONS[1:], "crop_min_tokens", "crop_max_tokens", "return_zoom_reports"]))
    if rng.random() < 0.5:
        return f"{name} in the call", {name: 0.5}
    return f"{name} in a generation config", {"generation_config": GenerationConfig(**{name: 0.5})}


def bad_ids(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    ids = inputs["input_ids"]
    number, width = rng.randrange(len(ids)), rng.randrange(1, ids.shape[1])
    out_of_range = ids.clone()
    out_of_range[number, width] = rng.choice([-100, -1, 320, 10**6])
    forms = {
        "list": ids.tolist(),
        "one-dimensional": ids[number],
        "three-dimensional": ids[None],
        "floats": ids.float(),
        "booleans": ids > 0,
        "array": ids.numpy(),
        "no columns": ids[:, :0],
        "no rows": ids[:0],
        "out of range": out_of_range,
        "columns missing": ids[:, :width],
        "text": "what is it?",
    }
    name = rng.choice(list(forms))
    return f"input_ids: {name}", {"input_ids": forms[name]}


def bad_mask(rng: random.Random, inputs: dict, *, padding: bool) -> tuple[str, dict[str, Any]]:
    """`padding`: also masks that only generation refuses."""
    mask = inputs["attention_mask"]
    row = rng.randrange(len(mask))
    empty, right, odd = mask.clone(), mask.clone(), mask.clone()
    empty[row], right[row, -rng.randrange(1, 4) :], odd[row, -1] = 0, 0, rng.choice([-1, 2, 7])
    forms = {
        "list": mask.tolist(),
        "too short": mask[:, 1:],
        "too long": torch.nn.functional.pad(mask, (1, 0)),
        "rows missing": mask[1:],
        "four-dimensional": mask[:, None, None],
        "odd numbers": odd,
        "junk": rng.choice(["x", 3, {}]),
    }
    if padding:
        forms |= {"an empty row": empty, "padded on the right": right}
    name = rng.choice(list(forms))
    return f"attention_mask: {name}", {"attention_mask": forms[name]}


def bad_pixels(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    pixels = inputs["pixel_values"]
    broken = pixels.clone()
    broken[rng.randrange(len(pixels))] = rng.choice([float("nan"), float("inf")])
    forms = {
        "missing": None,
        "some missing": pixels[: rng.randrange(len(pixels))],
        "doubled": torch.cat([pixels, pixels]),
        "narrow": pixels[..., 1:],
        "another dimension": pixels[None],
        "list": pixels.tolist(),
        "not finite": broken,
    }
    name = rng.choice(list(forms))
    return f"pixel_values: {name}", {"pixel_values": forms[name]}


def bad_grid(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    grid = inputs["image_grid_thw"]
    forms = {
        "missing": None,
        "zero": grid * 0,
        "negative": -grid,
        "frames": grid * torch.tensor([2, 1, 1]),
        "odd": grid + torch.tensor([0, 1, 0]),
        "larger": grid * torch.tensor([1, 2, 1]),
        "list": grid.tolist(),
        "floats": grid.float(),
        "flat": grid.flatten(),
        "one more": torch.cat([grid, grid[:1]]),
        "one less": grid[1:],
        "two columns": grid[:, 1:],
    }
    name = rng.choice(list(forms))
    return f"image_grid_thw: {name}", {"image_grid_thw": forms[name]}


def bad_types(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    types = inputs["mm_token_type_ids"]
    forms = {"zeros": types * 0, "ones": types * 0 + 1, "short": types[:, 1:], "list": types.tolist()}
    name = rng.choice(list(forms))
    return f"mm_token_type_ids: {name}", {"mm_token_type_ids": forms[name]}


def bad_sources(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    sources = inputs["source_images"]
    forms = {
        "missing": None,
        "one less": sources[1:],
        "one more": [*sources, sources[0]],
        "floats beyond a byte": [source.float() * 999.5 for source in sources],
        "channels last": [source.permute(1, 2, 0) for source in sources],
        "no area": [source[:, :0] for source in sources],
        "rows": [[source] for source in [*sources, sources[0]]],
        "None": [None for _ in sources],
        "junk": [_junk(rng) for _ in sources],
        "junk alone": rng.choice([1, 2.5, "no such file.png", object()]),
    }
    name = rng.choice(list(forms))
    return f"source_images: {name}", {"source_images": forms[name]}


def bad_boxes(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    count = len(inputs["source_images"])
    boxes = torch.tensor([[0.0, 0.0, 50.0, 50.0]] * count)
    broken = boxes.clone()
    broken[rng.randrange(count), rng.randrange(4)] = rng.choice([float("nan"), float("inf"), float("-inf")])
    forms = {
        "text": "0 0 50 50",
        "not finite": broken,
        "turned round": boxes[:, [2, 1, 0, 3]],
        "no area": boxes * 0,
        "one more": torch.cat([boxes, boxes[:1]]),
        "three numbers": boxes[:, :3],
        "junk": rng.choice([3, object(), {"x0": 1}, [[None]]]),
        "strings": [["0", "0", "9", "9"]] * count,
    }
    name = rng.choice(list(forms))
    return f"source_boxes: {name}", {"source_boxes": forms[name]}


def bad_targets(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    rows = len(inputs["input_ids"])
    forms: dict[str, dict[str, Any]] = {
        "too many gate targets": {"gate_targets": torch.ones(rows + 1)},
        "gate targets of another kind": {"gate_targets": torch.full((rows,), 0.5)},
        "gate targets as text": {"gate_targets": "yes"},
        "too few region targets": {"region_targets": []},
        "region targets for text": {"region_targets": [torch.ones(1, 1, 1)] * rows + [None]},
        "labels and targets": {"labels": inputs["input_ids"], "gate_targets": torch.ones(rows)},
        "a misspelt keyword": {_typo(rng, "gate_targets"): torch.ones(rows), "gate_targets": torch.ones(rows)},
        "queries beyond the end": {"gate_targets": torch.ones(rows), "query_positions": torch.full((rows, 1), 9999)},
        "queries of one dimension": {"gate_targets": torch.ones(rows), "query_positions": torch.zeros(rows).long()},
    }
    name = rng.choice(list(forms))
    return name, forms[name]


def bad_zoom_boxes(rng: random.Random, inputs: dict) -> tuple[str, dict[str, Any]]:
    rows = len(inputs["input_ids"])
    rest = [None] * (rows - 1)
    forms: dict[str, Any] = {
        "text": "everywhere",
        "too many": [None] * (rows + 1),
        "three numbers": [(0, 0, 9), *rest],
        "no area": [(9, 9, 9, 20), *rest],
        "outside": [(5000, 5000, 6000, 6000), *rest],
        "not finite": [(0, 0, float("nan"), 9), *rest],
        "no such image": [(7, (0, 0, 30, 30)), *rest],
        "junk": [rng.choice(["x", object(), {}, 2.5]), *rest],
    }
    name = rng.choice(list(forms))
    return f"zoom_boxes: {name}", {"zoom_boxes": forms[name], "labels": inputs["input_ids"]}


def draw_generate(rng: random.Random, family: str) -> Draw:
    inputs = make_inputs(family, _rows(rng))
    kinds: list[Callable] = [bad_ids, bad_pixels, bad_sources, bad_boxes, bad_option, misspelt_option]
    kinds += [] if not FAMILY[family].has_budget else [bad_grid, bad_types]
    kind = rng.choice([*kinds, bad_mask])
    if kind in (bad_option, misspelt_option):
        name, changes = kind(rng)
    else:
        name, changes = kind(rng, inputs, padding=True) if kind is bad_mask else kind(rng, inputs)
    if kind is bad_boxes:
        inputs["zoom"] = "always"
    arguments = {"max_new_tokens": 1, **inputs, **changes}
    if rng.random() < 0.3 and "zoom" not in arguments and "generation_config" not in arguments:
        arguments["zoom"] = rng.choice(["auto", "always"])
    return Draw("generate", family, name, lambda: shared_model(family).generate(**arguments))


def draw_forward(rng: random.Random, family: str) -> Draw:
    inputs = make_inputs(family, _rows(rng))
    kinds: list[Callable] = [bad_ids, bad_pixels, bad_sources, bad_boxes, bad_targets, bad_zoom_boxes, bad_mask]
    kinds += [] if not FAMILY[family].has_budget else [bad_grid, bad_types]
    kind = rng.choice(kinds)
    name, changes = kind(rng, inputs, padding=False) if kind is bad_mask else kind(rng, inputs)
    if kind is bad_targets:
        arguments = {**plain_inputs(inputs), **changes}
    elif kind in (bad_sources, bad_boxes, bad_zoom_boxes) or rng.random() < 0.5:
        # None for source_images alone would be the plain model's own training pass
        boxes = {"zoom_boxes": [None] * len(inputs["input_ids"])} if kind is bad_sources else {}
        arguments = {"labels": inputs["input_ids"], **inputs, **boxes, **changes}
    else:
        targets = {"gate_targets": torch.ones(len(inputs["input_ids"]))}
        arguments = {**plain_inputs(inputs), **targets, **changes}
    return Draw("forward", family, name, lambda: shared_model(family)(**arguments))


PLACEHOLDER = {"llava": "<image>"}


def draw_processor(rng: random.Random, family: str) -> Draw:
    place = PLACEHOLDER.get(family, "<|vision_start|><|image_pad|><|vision_end|>")
    image = Image.new("RGB", (rng.randrange(30, 90), rng.randrange(30, 90)))
    text = f"see {place} there"
    tokens = FAMILY[family].budget(4, 24)
    forms: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "an image too few": ({"images": [], "text": text}, {}),
        "an image too many": ({"images": [image, image], "text": text}, {}),
        "no image": ({"text": [text, "x"]}, {}),
        "an image of junk": ({"images": [_junk(rng)], "text": text}, {}),
        "an image that is not there": ({"images": ["no such file.png"], "text": text}, {}),
        "no prompts": ({"text": []}, {}),
        "text of junk": ({"text": rng.choice([3, 2.5, object(), [1], [None], [["a"], 2]])}, {}),
        "a misspelt keyword": ({"images": [image], "text": text, _typo(rng, "return_tensors"): "pt"}, {}),
        "an unknown tensor type": ({"images": [image], "text": text, "return_tensors": "xx"}, {}),
        "padding of junk": ({"images": [image], "text": text, "padding": rng.choice(["right", "lef", 2.5])}, {}),
        "a side of junk": ({"images": [image], "text": text, "padding_side": rng.choice(["up", 3])}, {}),
    }
    budgets = {
        "min_tokens": [0, -1, 2.5, "4", True, 10**9],
        "max_tokens": [0, -1, 2.5, "9", False, 10**9],
    }
    for bound, values in budgets.items():
        value = rng.choice(values)
        forms[f"{bound}={value!r} in the call"] = ({"images": [image], "text": text, bound: value}, {})
        forms[f"{bound}={value!r} of the processor"] = ({"images": [image], "text": text}, {bound: value})
    name = rng.choice(list(forms))
    arguments, settings = forms[name]
    return Draw("processor", family, name, lambda: PROCESSORS[family](**{**tokens, **settings})(**arguments))


DRAW = {"generate": draw_generate, "forward": draw_forward, "processor": draw_processor}


def draws(seed: int, count: int) -> list[Draw]:
    rng = random.Random(seed)
    return [rng.choice([DRAW["generate"], *DRAW.values()])(rng, rng.choice(FAMILIES)) for _ in range(count)]


def fault(draw: Draw) -> str | None:
    """What is wrong with the answer to a malformed call; None for an error that names its cause."""
    try:
        answer = draw.call()
    except (ValueError, TypeError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        is_plain = isinstance(error, modeling_qzoom.QZoomError) or type(error) in (ValueError, TypeError)
        ours = frame.filename.startswith(OURS) and is_plain
        if (ours or frame.name in THEIRS) and len(str(error)) > 20:
            return None
        place = f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        return f"{type(error).__name__} at {place}: {str(error)[:120]}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:120]}"
    return f"accepted, returned a {type(answer).__name__}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_malformed_calls_end_in_errors_that_name_the_cause():
    faults = []
    for number, draw in enumerate(draws(SEED, CALLS)):
        problem = fault(draw)
        if problem is not None:
            faults.append(f"{number}: {draw.target} of {draw.family}, {draw.name}: {problem}")
    assert not faults, f"MALFORMED_CALLS_SEED={SEED}: {len(faults)} of {CALLS}\n" + "\n".join(faults)
