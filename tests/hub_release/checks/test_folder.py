"""The checks of a built folder: a right one passes; one with one thing wrong is refused for that reason."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from hub_release.build import build
from hub_release.checks.folder import check_folder
from hub_release.repository.files import AUTO_MAPS, package_version
from modeling_qzoom import QZoomForConditionalGeneration
from tests.loading_fixtures import edit_weights
from tests.release_fixtures import ROOT, data_folder, write_figures


def findings(folder: Path) -> list[str]:
    return [sentence for found in check_folder(folder).values() for sentence in found]


def test_nothing_is_wrong_with_what_was_built(published):
    assert check_folder(published) == {
        name: [] for name in ("files", "code", "auto_map", "contents", "weights", "card")
    }


def replace(name: str, old: str, new: str):
    """A change to a text file."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def write(name: str, content: str | bytes = ""):
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def fields(name: str, **changes):
    """A change to a JSON file; None removes a field."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def weights(drop: str | None = None, **add):
    return lambda folder: edit_weights(folder, drop=drop, add={name.replace("__", "."): add[name] for name in add})


def add_line(name: str, line: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + line)


def link(folder: Path) -> None:
    (folder / "merges.txt").symlink_to(folder / "config.json")


def torch_file(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "merges.txt")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


REFERENCES = AUTO_MAPS["config.json"]
HEAD = 'license: "apache-2.0"\n'
WRONG = {
    # files
    "extra file": (write("notes.txt"), r"notes\.txt does not belong in a repository"),
    "extra code": (write("more_qzoom.py"), r"more_qzoom\.py does not belong in a repository"),
    "hidden file": (write(".cache/x.json", "{}"), r"\.cache/x\.json does not belong in a repository"),
    "missing code": (remove("processing_keywords_qzoom.py"), r"code file processing_keywords_qzoom\.py is missing"),
    "missing licence": (remove("LICENSE"), "LICENSE is missing"),
    "missing chat template": (remove("chat_template.jinja"), r"chat_template\.jinja is missing"),
    "link": (link, r"merges\.txt is a link"),
    "pickle by name": (write("optimizer.pt"), r"optimizer\.pt is a pickle"),
    "pickle by content": (write("tokenizer.model", pickle.dumps({})), r"tokenizer\.model is a pickle"),
    "pickle in an archive": (torch_file, r"merges\.txt is a pickle"),
    # code
    "absolute import": (
        add_line("zoom_crops_qzoom.py", "\n\ndef f():\n    from modeling_qzoom.zoom_regions_qzoom import Box\n"),
        r"zoom_crops_qzoom\.py, line \d+: absolute import of modeling_qzoom",
    ),
    "annotations as text": (
        replace("zoom_crops_qzoom.py", "import math\n", "from __future__ import annotations\nimport math\n"),
        r"zoom_crops_qzoom\.py, line \d+: .* __future__ import",
    ),
    "import text in a string": (
        add_line("zoom_crops_qzoom.py", '\nEXAMPLE = """\nfrom .nowhere_qzoom import x\n"""\n'),
        r"zoom_crops_qzoom\.py, line \d+: text in a string that transformers takes for an import",
    ),
    "optional import": (add_line("zoom_crops_qzoom.py", "\nimport peft\n"), "peft is imported at the top"),
    "import of a folder": (
        add_line("zoom_crops_qzoom.py", "\nfrom . import zoom_regions_qzoom\n"),
        "modules beside it by name",
    ),
    "broken code": (add_line("zoom_crops_qzoom.py", "\ndef\n"), r"zoom_crops_qzoom\.py cannot be parsed"),
    # auto_map
    "wrong auto_map": (
        fields("config.json", auto_map=REFERENCES | {"AutoModel": "modeling_qzoom.Other"}),
        r"config\.json: auto_map has 'modeling_qzoom\.Other' for AutoModel, and should have",
    ),
    "missing auto_map": (
        fields("processor_config.json", auto_map=None),
        r"processor_config\.json: auto_map has None for AutoProcessor",
    ),
    "one class too many": (
        fields("config.json", auto_map=REFERENCES | {"AutoModelForCausalLM": REFERENCES["AutoModel"]}),
        "for AutoModelForCausalLM, which is no class of ours",
    ),
    "no such class": (
        replace("processing_qzoom.py", "class QZoomProcessor(", "class Processor("),
        r"processing_qzoom\.py defines no class QZoomProcessor",
    ),
    # contents
    "altered code": (
        add_line("report_qzoom.py", '\nraise RuntimeError("broken on arrival")\n'),
        r"^report_qzoom\.py: not as in this package; changed after the build",
    ),
    "altered code, no version named": (
        lambda folder: [
            add_line("zoom_crops_qzoom.py", "\n")(folder),
            replace("processing_keywords_qzoom.py", "def ", "def  ")(folder),
            fields("config.json", qzoom_version=None)(folder),
        ],
        r"^processing_keywords_qzoom\.py, zoom_crops_qzoom\.py: not as in this package .*built by another version, "
        r"which the folder",
    ),
    "code of another version": (
        lambda folder: [
            add_line("zoom_crops_qzoom.py", "\n")(folder),
            fields("config.json", qzoom_version="0.0.7")(folder),
        ],
        rf"built by version 0\.0\.7 of the package, and this is version {re.escape(package_version())}, whose code",
    ),
    "unknown field": (fields("config.json", gate="open"), "nothing reads the field 'gate'"),
    "tokenizer of others": (
        fields("tokenizer_config.json", auto_map={"AutoTokenizer": ["someone/else--tokenization.Tokenizer", None]}),
        r"tokenizer_config\.json: AutoTokenizer refers to .*someone/else--tokenization\.Tokenizer",
    ),
    "image processor of others": (
        lambda folder: fields(
            "processor_config.json",
            image_processor={
                **json.loads((folder / "processor_config.json").read_text())["image_processor"],
                "auto_map": {"AutoImageProcessor": "images.Processor"},
            },
        )(folder),
        r"processor_config\.json: AutoImageProcessor refers to 'images\.Processor'",
    ),
    "pipeline of others": (
        fields("generation_config.json", custom_pipelines={"zoom": {"impl": "pipe.Pipe"}}),
        r"generation_config\.json: zoom refers to \{'impl': 'pipe\.Pipe'\}",
    ),
    # weights
    "missing branch weight": (weights("zoom.gate.head.bias"), r"branch weights are missing: zoom\.gate\.head\.bias$"),
    "missing weight of the VLM": (
        weights("vlm.model.norm.weight"),
        r"weights of the VLM are missing: vlm\.model\.language_model\.norm\.weight$",
    ),
    "weight too many": (
        weights(zoom__gate__tail=torch.zeros(1)),
        r"weights that the model has no place for: zoom\.gate\.tail$",
    ),
    "wrong shape": (
        weights("zoom.gate.head.bias", zoom__gate__head__bias=torch.zeros(2)),
        r"zoom\.gate\.head\.bias has the shape \(2,\) instead of \(1,\)",
    ),
    "other K": (fields("config.json", branch_layer=9), "config.json describes no model: .*exceeds the VLM's 6"),
    "stray weights": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"),
        r"model-00001-of-00002\.safetensors is read by nobody",
    ),
    "cut off": (cut, r"model\.safetensors is cut off or damaged"),
    "local base": (
        lambda folder: [
            fields("config.json", base_model_name_or_path="/data/base")(folder),
            replace("README.md", "base_model: someone/base\n", "")(folder),
        ],
        "names the base model '/data/base', which others cannot reach",
    ),
    # card
    "stale figure": (
        replace("README.md", "| fine_accuracy_zoom | 0.750 |", "| fine_accuracy_zoom | 0.950 |"),
        r"section 'Figures' is stale: it says '\| fine_accuracy_zoom \| 0\.950 .*the files say .* 0\.750 ",
    ),
    "stale figures file": (
        fields("evaluation/figures.json", by_page_kind=None),
        "section 'Figures' is stale: it says '. figure, by kind of page",
    ),
    "stale preset": (
        fields("config.json", presets={"fast": {"gate_threshold": 0.9}}),
        "section 'Settings' is stale",
    ),
    "stale times": (remove("evaluation/times.json"), "states training times, but there is no evaluation/times.json"),
    "damaged figures": (write("evaluation/figures.json", '{"summary": {"a": "b"}}'), "not in the form that"),
    "no limits": (replace("README.md", "## Limits\n\nAll.\n", ""), "no section 'Limits'"),
    "no head": (replace("README.md", "---\n", ""), "begins with no YAML head"),
    "broken head": (replace("README.md", HEAD, "license: [\n"), "the head is not YAML"),
    "no licence": (replace("README.md", HEAD, ""), "the head has no license"),
    "unnamed licence": (replace("README.md", HEAD, "license: other\n"), "'other' needs license_name and license_link"),
    "wrong library": (
        replace("README.md", "library_name: transformers", "library_name: peft"),
        "library_name is 'peft'",
    ),
    "no tag": (replace("README.md", "tags: [q-zoom, tiny]", "tags: [tiny]"), "the tags lack 'q-zoom'"),
    "other base": (
        replace("README.md", "base_model: someone/base", "base_model: someone/else"),
        "base_model is 'someone/else', config.json says 'someone/base'",
    ),
    "no relation": (replace("README.md", "base_model_relation: finetune\n", ""), "no base_model_relation"),
    "another checkpoint's card": (lambda folder: shutil.copy(ROOT / "README.md", folder), "begins with no YAML head"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_one_thing_wrong_is_refused_for_that_reason(folder, kind):
    change, reason = WRONG[kind]
    change(folder)
    assert [bool(re.search(reason, found)) for found in findings(folder)] == [True]


def test_licence_of_the_base(folder):
    (folder / "BASE_LICENSE.txt").unlink()
    found = findings(folder)
    assert any("the base model's licence is missing" in sentence for sentence in found)
    assert any("section 'Licence' is stale" in sentence for sentence in found) and len(found) == 2


def test_figures_of_another_calibration(tmp_path):
    """The card agrees with the figures, but they were measured with another threshold."""
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    conditions = {"command": "measure", "gate_threshold": 0.4, "effort": None}
    write_figures(data, figures={"summary": {"a": 0.5}, "conditions": conditions})
    found = findings(build(data, tmp_path / "built", licence="mit"))
    assert len(found) == 1 and "measured with gate_threshold 0.4, the checkpoint has 0.1" in found[0]


def test_several_things_wrong_are_all_told(folder):
    for kind in ("absolute import", "wrong auto_map", "missing branch weight"):
        WRONG[kind][0](folder)
    found = check_folder(folder)
    assert [len(found[name]) for name in ("code", "auto_map", "weights")] == [1, 1, 1]
    assert "card" not in found  # it states the size of the weights


def test_shards_and_their_index(tmp_path):
    data = data_folder("qwen2_5_vl", tmp_path / "data")
    QZoomForConditionalGeneration.from_pretrained(data).save_pretrained(tmp_path / "split", max_shard_size="400KB")
    for path in data.iterdir():
        if path.name.startswith(("tokenizer", "processor", "chat")):
            shutil.copy(path, tmp_path / "split")
    folder = build(tmp_path / "split", tmp_path / "built", licence="mit")
    assert findings(folder) == []
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    wrong = index["weight_map"] | {name: max(index["weight_map"].values())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": wrong}))
    assert "hold different tensors" in findings(folder)[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / index["weight_map"][name]).unlink()
    assert f"{index['weight_map'][name]} is missing" in findings(folder)[0]
