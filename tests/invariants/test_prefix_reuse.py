"""Prefix reuse equals a full second prefill.

The reference is the plain VLM's own forward over the fused prompt, which for sequential positions is a stock prompt
with one more image. Continuous positions are written down here once more, by the rule of paper III-D.
"""

import pytest
import torch

import modeling_qzoom.zoom_decisions_qzoom as decisions
from modeling_qzoom.zoom_crops_qzoom import Crop
from tests.families import FAMILY
from tests.tiny import FAMILIES, Row, make_inputs, plain_inputs, qwen_tokenizer, tiny_model, tiny_vlm


NEW_TOKENS = 3
THRESHOLD = 0.7
ROWS = {
    "text around": Row(["what is written in ", None, " the top left corner?"], [(4, 5)], seed=1),
    "image first": Row([None, "short?"], [(2, 6)], seed=2),
    "image last": Row(["a long question that comes before its image ", None], [(5, 3)], seed=3),
    "several images": Row([None, "and", None, "then", None, "compare"], [(2, 3), (3, 4), (4, 2)], seed=4),
    "several turns": Row(["turn one ", None, " yes. turn two ", None, " which?"], [(3, 3), (2, 2)], seed=5),
    "one cell high": Row(["a strip ", None, " of text"], [(1, 7)], seed=6),
    "one cell wide": Row(["a column ", None, " of text"], [(6, 1)], seed=7),
}
CASES = [
    ("qwen2_5_vl", 3, "continuous"),
    ("qwen2_5_vl", 3, "sequential"),
    ("qwen3_vl", 3, "continuous"),
    ("qwen3_vl", 3, "sequential"),
    ("qwen3_vl", 1, "continuous"),
    ("llava", 3, None),
]
CASES += [(family, 3, None) for family in FAMILIES if family not in {case[0] for case in CASES}]


class CropSpy:
    """Keeps what `cut_crop` returned, by source image."""

    def __init__(self, monkeypatch):
        self.crops: dict[int, Crop] = {}
        original = decisions.cut_crop

        def record(source, box, recipe):
            self.crops[source.data_ptr()] = original(source, box, recipe)
            return self.crops[source.data_ptr()]

        monkeypatch.setattr(decisions, "cut_crop", record)


def covered_cells(heatmap: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last covered cell (x0, y0, x1, y1), ends included."""
    rows, columns = (heatmap > THRESHOLD * heatmap.max()).nonzero(as_tuple=True)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def fused_prompt(family: str, inputs: dict, report, crop: Crop) -> tuple[dict, slice]:
    """Inputs of the plain VLM for one row's fused prompt, and where the crop's tokens are in it."""
    tokenizer = FAMILY[family].tokenizer()
    patches, grid = crop.pixel_values, crop.patch_grid
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    image_token = tokenizer.convert_tokens_to_ids(FAMILY[family].image_token)
    columns = (ids == image_token).nonzero()[:, 0]
    if not FAMILY[family].has_budget:
        sizes, before, after = [16] * len(pixels), [], []
        patch_sizes, count = [1] * len(pixels), 16
    else:
        thw = inputs["image_grid_thw"]
        patch_sizes, count = thw.prod(1).tolist(), grid[1] * grid[2] // 4
        sizes = [patches_of_image // 4 for patches_of_image in patch_sizes]
        before, after = ([tokenizer.convert_tokens_to_ids(f"<|vision_{side}|>")] for side in ("start", "end"))
    image = report.image_index
    end = int(columns[sum(sizes[: image + 1]) - 1]) + 1
    if after and end < len(ids) and int(ids[end]) == after[0]:
        end += 1
    block = torch.tensor([*before, *[image_token] * count, *after])
    place = slice(end + len(before), end + len(before) + count)
    split = sum(patch_sizes[: image + 1])
    fused = {
        "input_ids": torch.cat([ids[:end], block, ids[end:]])[None],
        "pixel_values": torch.cat([pixels[:split], patches, pixels[split:]]),
    }
    if FAMILY[family].has_budget:
        fused["image_grid_thw"] = torch.cat([thw[: image + 1], torch.tensor([grid]), thw[image + 1 :]])
        fused["mm_token_type_ids"] = (fused["input_ids"] == image_token).int()
    return fused, place


def reference_positions(vlm, fused: dict, place: slice, report, alignment: str) -> torch.Tensor:
    """(3, 1, F) positions of the fused prompt."""
    grid_names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    positions = vlm.model.get_rope_index(**{name: fused[name] for name in grid_names})[0].float()
    if alignment == "sequential":
        return positions
    grids = fused["image_grid_thw"]
    image = report.image_index
    _, height, width = (grids[image + 1] // torch.tensor([1, 2, 2])).tolist()
    start = int((grids[:image].prod(1) // 4).sum())
    first = (fused["mm_token_type_ids"][0] == 1).nonzero()[start, 0]
    origin = float(positions[0, 0, first])
    x0, y0, x1, y1 = covered_cells(report.heatmap)
    rows = torch.linspace(origin + y0, origin + y1, height)
    columns = torch.linspace(origin + x0, origin + x1, width)
    positions[1, 0, place] = rows.repeat_interleave(width)
    positions[2, 0, place] = columns.repeat(height)
    return positions


@torch.no_grad()
def reference_logits(vlm, family: str, inputs: dict, report, crop, new_tokens, alignment: str) -> torch.Tensor:
    """(NEW_TOKENS, vocabulary) logits of one plain forward over the fused prompt and the tokens after it."""
    fused, place = fused_prompt(family, inputs, report, crop)
    if FAMILY[family].has_budget:
        positions = reference_positions(vlm, fused, place, report, alignment)
        steps = positions[..., -1:] + torch.arange(1, NEW_TOKENS)
        fused["position_ids"] = torch.cat([positions, steps], dim=-1)
        fused["mm_token_type_ids"] = torch.nn.functional.pad(fused["mm_token_type_ids"], (0, NEW_TOKENS - 1))
    fused["input_ids"] = torch.cat([fused["input_ids"], new_tokens[None, : NEW_TOKENS - 1]], dim=1)
    fused["attention_mask"] = torch.ones_like(fused["input_ids"])
    return vlm(**fused).logits[0, -NEW_TOKENS:]


def check(case: tuple, rows: list[Row], monkeypatch, strip_end_marker: bool = False) -> None:
    family, branch_layer, alignment = case
    model, vlm = tiny_model(family, branch_layer=branch_layer), tiny_vlm(family)
    spy = CropSpy(monkeypatch)
    inputs = make_inputs(family, rows)
    singles = [make_inputs(family, [row]) for row in rows]
    if strip_end_marker:
        keep = inputs["input_ids"][0] != qwen_tokenizer().convert_tokens_to_ids("<|vision_end|>")
        for part in (inputs, singles[0]):
            part |= {name: part[name][:, keep] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    options = {"zoom": "always", "region_threshold": THRESHOLD, "region_threshold_mode": "peak"}
    output = model.generate(
        **inputs,
        **options,
        position_alignment=alignment,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_zoom_reports=True,
    )
    first_image = 0
    for row, single in enumerate(singles):
        report = output.zoom_reports[row]
        assert report.zoomed
        source = inputs["source_images"][first_image + report.image_index]
        first_image += len(single["source_images"])
        expected = reference_logits(
            vlm,
            family,
            plain_inputs(single),
            report,
            spy.crops[source.data_ptr()],
            output.sequences[row, -NEW_TOKENS:],
            alignment,
        )
        actual = torch.stack([step[row] for step in output.logits])
        scale = expected.max() - expected.min()
        assert (actual - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("name", ROWS)
def test_a_row_equals_a_full_second_prefill(case, name, monkeypatch):
    check(case, [ROWS[name]], monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_batch_with_holes_equals_full_second_prefills(case, monkeypatch):
    check(case, list(ROWS.values()), monkeypatch)


@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: "-".join(map(str, case)))
def test_a_prompt_without_the_end_marker(case, monkeypatch):
    check(case, [ROWS["text around"]], monkeypatch, strip_end_marker=True)


def test_alignments_differ():
    """A wrong alignment is far outside the tolerance above."""
    for family in ("qwen2_5_vl", "qwen3_vl"):
        model, inputs = tiny_model(family), make_inputs(family, [ROWS["text around"]])
        arguments = {"zoom": "always", "region_threshold": THRESHOLD, "region_threshold_mode": "peak"}
        arguments |= {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        first, second = (
            model.generate(**inputs, **arguments, position_alignment=alignment).logits[0]
            for alignment in ("continuous", "sequential")
        )
        assert (first - second).abs().max() > 0.01
