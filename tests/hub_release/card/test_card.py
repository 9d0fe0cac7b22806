"""Model cards: what an author wrote is kept, everything else is what the files say, and the examples run."""

import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from hub_release.build import build
from hub_release.card.card import render, stale_sections
from hub_release.card.facts import read_facts
from hub_release.card.parts import read_card, rename, repository_of
from hub_release.card.tables import figure_table, spread_table
from hub_release.card.texts import QUICK_START
from hub_release.repository.errors import BuildError
from tests.release_fixtures import DEMO, FIGURES, data_folder, write_figures


ROOT = Path(__file__).resolve().parents[3]
AUTHORS = """\
---
language: en
license: other
license_name: a name
license_link: https://example.com
tags:
  - mine
  - q-zoom
---

# My model

It reads.

```python
# no heading
```

## Figures

| old | 1 |

## How it was trained

Slowly.

## Thanks

To all.
"""


def test_what_the_author_wrote_is_kept_and_facts_are_replaced(published):
    facts = read_facts(published, "me/model")
    text = render(read_card(AUTHORS), facts)
    card = read_card(text)
    assert card.title == "My model" and card.introduction.startswith("It reads.")
    assert card.sections["How it was trained"] == "Slowly." and card.sections["Thanks"] == "To all."
    assert "| old | 1 |" not in text and "| fine_accuracy_zoom | 0.750 | 0.700 – 0.800 |" in text
    assert "license: other\nlicense_name: a name" in text and "tags: [q-zoom, mine]" in text
    assert repository_of(card) == "me/model"
    assert stale_sections(text, facts) == []
    assert render(card, facts) == text


def test_a_card_from_nothing(published):
    text = render(read_card(""), read_facts(published, "me/model"), "mit")
    card = read_card(text)
    assert card.title == "model" and "qwen2_5_vl" in card.introduction
    assert 'license: "mit"' in text and "has not stated it" in card.sections["How it was trained"]
    assert "One box per question" in card.sections["Limits"]


def test_facts_of_the_config_and_the_measurement(published):
    card = read_card((published / "README.md").read_text())
    settings, figures = card.sections["Settings"], card.sections["Figures"]
    for row in ("| 3 |", "| 2 |", "zooms from probability 0.1 on", "0.6 of the map's peak", "4 to 24 tokens"):
        assert row in settings
    assert f"`{FIGURES['conditions']['command']}`" in figures and "dtype float32" in figures
    assert "| scene (3 rows) |" in figures and "| multi_accuracy_zoom | 0.125 |" in figures
    assert card.sections["Training time"].endswith("| all of it | 1.5 |")
    assert "`BASE_LICENSE.txt`" in card.sections["Licence"]
    assert "base_model: someone/base\nbase_model_relation: finetune" in (published / "README.md").read_text()


def test_spread_and_shifted_figures_stand_beside(tmp_path):
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    seeds = {"seeds": 3, "rows": 9, "spread": {"gate_auroc": {"lowest": 0.4, "mean": 0.5, "highest": 0.6}}}
    shifted = {**FIGURES, "summary": {"fine_accuracy_zoom": 0.25}}
    write_figures(data, figures=FIGURES, seeds=seeds, shifted=shifted)
    figures = read_card((build(data, tmp_path / "out") / "README.md").read_text()).sections["Figures"]
    assert "| fine_accuracy_zoom | 0.750 | 0.700 – 0.800 | 0.250 |" in figures
    assert figure_table(FIGURES, shifted) in figures and spread_table(seeds) in figures
    write_figures(data, figures={"summary": {}})
    with pytest.raises(BuildError, match="not in the form that"):
        build(data, tmp_path / "other")


def test_without_figures_the_card_says_so(tmp_path):
    folder = build(data_folder("llava", tmp_path / "data"), tmp_path / "out")
    sections = read_card((folder / "README.md").read_text()).sections
    assert sections["Figures"].startswith("None") and "Training time" not in sections
    assert "as the image processor is set" in sections["Settings"]


def test_renaming_touches_the_examples_only(published):
    text = (published / "README.md").read_text()
    renamed = rename(text, "me/model")
    assert repository_of(read_card(renamed)) == "me/model"
    assert renamed.replace('name = "me/model"', 'name = "built"') == text
    assert rename("# no card of ours\n", "me/model") == "# no card of ours\n"


def test_stated_versions_are_those_of_the_package():
    low, high = re.search(r'"transformers>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    assert f"`transformers` {low} or newer, below {high}" in QUICK_START


def test_the_examples_run(tmp_path, monkeypatch):
    """Every block of a card, in order, beside a built demo checkpoint."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    text = (build(DEMO, tmp_path / "demo") / "README.md").read_text()
    Image.open(ROOT / "examples" / "assets" / "page.png").save(tmp_path / "page.png")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    space, printed = {}, StringIO()
    with redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), space)
    answer, decided, piped = printed.getvalue().splitlines()
    assert answer and answer == piped
    assert decided.startswith(space["output"].zoom_reports[0].reason)
    assert Image.open("where-it-looked.png").width > 0
    assert space["small"].is_loaded_in_4bit
    assert next(space["small"].vlm.model.visual.blocks[0].attn.qkv.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"crop_budget": "need"}, ["| crop | floor 4, cap 24, by need |"]),
        (
            {"crop_budget": "visionrl2", "crop_min_tokens": None, "crop_max_tokens": None, "crop_target_tokens": 160},
            ["| crop | target 160, by need as in Vision-RL² |"],
        ),
        (
            {"region_blur": "grid", "region_min_peak": 0.03, "region_min_contrast": 3.0},
            [
                "| smallest peak of the heat map | 0.03 |",
                "| smallest peak over mean of the heat map | 3.0 |",
                "| blur of the heat map | wider on larger grids |",
            ],
        ),
    ],
)
def test_rules_of_crop_and_region_are_in_the_card(published, tmp_path, fields, rows):
    folder = shutil.copytree(published, tmp_path / "rules")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "crop_min_tokens": 4, "crop_max_tokens": 24, **fields}))
    settings = read_card(render(read_card(""), read_facts(folder, "me/model"), "mit")).sections["Settings"]
    assert all(row in settings for row in rows)
