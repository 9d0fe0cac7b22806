"""`verify.py`: its verdict, and what a right repository does in another process."""

import subprocess
import sys

import peft
import pytest

from hub_release import verify as verify_module
from hub_release.build import build
from hub_release.repository.code import published_files
from hub_release.repository.files import AUTO_MAPS
from hub_release.verify import judge, needed_packages, verify
from modeling_qzoom import QZoomForConditionalGeneration
from tests.loading_fixtures import attach, plain_folder
from tests.lora_support import needs_lora
from tests.release_fixtures import DEMO, ROOT, clean_python, converted_golden, data_folder, golden_tokenizer


def verdict(capsys, *arguments) -> tuple[int, list[str]]:
    status = verify_module.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out.splitlines()


def test_demo_checkpoint_passes(tmp_path, capsys):
    folder = build(DEMO, tmp_path / "demo")
    status, lines = verdict(capsys, folder, "--here")
    assert (status, lines[-1]) == (0, f"verdict: {folder} can be published")
    assert [line.split() for line in lines[:-1]] == [
        [name, "right"] for name in ("files", "code", "auto_map", "contents", "weights", "card", "loading")
    ]


def test_demo_checkpoint_in_4_bit_passes(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")
    folder = build(DEMO, tmp_path / "demo", variant="4bit")
    assert verify(folder, python=sys.executable) == []
    assert needed_packages(folder)[-2:] == ("accelerate", "bitsandbytes")


def test_demo_checkpoint_as_an_addon_passes(tmp_path):
    base = tmp_path / "base"
    QZoomForConditionalGeneration.from_pretrained(DEMO).vlm.save_pretrained(base)
    (base / "LICENSE").write_text("terms")
    folder = build(DEMO, tmp_path / "addon", variant="addon", base="someone/base", base_folder=base)
    assert verify(folder, python=sys.executable, base_folder=base) == []
    assert "say where that is with --base-folder" in verify(folder, python=sys.executable)[0]
    assert "peft" not in needed_packages(folder)


@needs_lora
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_addon_with_lora_passes(tmp_path):
    """Built from an add-on as it was saved."""
    base, data = tmp_path / "base", data_folder("qwen2_5_vl", tmp_path / "data")
    plain_folder("qwen2_5_vl", base)
    (base / "LICENSE").write_text("terms")
    model = attach(base, "qwen2_5_vl")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    (data / "model.safetensors").unlink()
    model.save_addon(data)
    folder = build(data, tmp_path / "built", base="someone/base", base_folder=base, licence="mit")
    assert (folder / "lora" / "adapter_model.safetensors").exists()
    assert "LoRA adapter" in (folder / "README.md").read_text()
    assert verify(folder, python=sys.executable, base_folder=base) == []
    assert needed_packages(folder)[-1] == "peft"


@pytest.mark.parametrize("case", ["qwen2_5_vl_a", pytest.param("qwen3_vl_a", marks=pytest.mark.slow)])
def test_converted_golden_checkpoint_passes(case, tmp_path):
    tokenizer = golden_tokenizer(tmp_path / "tokenizer")
    folder = build(converted_golden(case, tmp_path), tmp_path / "built", tokenizer=tokenizer, licence="apache-2.0")
    assert verify(folder, python=sys.executable) == []


def test_what_only_running_shows_is_refused_too(folder, capsys):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('broken on arrival') }}")
    status, lines = verdict(capsys, folder, "--here")
    assert status == 1 and "it cannot be used there: " in lines[-1] and "broken on arrival" in lines[-1]


def test_environments_that_are_of_no_use(folder, tmp_path, monkeypatch):
    assert "it cannot be used there: " in verify(folder, python=tmp_path / "no-python")[0]
    assert "timed out after 0.1 seconds" in verify(folder, python=sys.executable, timeout=0.1)[0]

    def fail(*arguments):
        raise RuntimeError("pip install torch failed: \nno index")

    monkeypatch.setattr(verify_module, "make_environment", fail)
    assert verify(folder) == ["no clean environment could be made; name one with --python. no index"]


def test_the_verdict_comes_last(folder, tmp_path, capsys):
    (folder / "notes.txt").touch()
    status, lines = verdict(capsys, folder, "--here")
    assert status == 1 and lines[-1] == f"verdict: {folder} is refused: notes.txt does not belong in a repository"
    assert "loading    not tried before the above is right" in lines
    status, lines = verdict(capsys, tmp_path / "nowhere")
    assert status == 1 and lines[-1].endswith("is not a folder")


def test_what_a_clean_process_reports_is_judged(published):
    door = {"text": "a", "gate_probability": 0.5, "box": [0, 0, 9, 9]}
    code = [path.name for path in published_files()]
    right = {"answers": {"AutoModel": door, "pipeline": {"text": "a"}}, "present": [], "code": code}
    right["auto_map"] = AUTO_MAPS["config.json"]
    other_pipeline, no_box = {"AutoModel": door, "pipeline": {"text": "b"}}, {"AutoModel": {**door, "box": None}}
    for change, said in (
        ({}, None),
        ({"answers": other_pipeline}, "answers differ: pipeline"),
        ({"answers": no_box}, "did not zoom"),
        ({"present": ["modeling_qzoom"]}, "loading there proves nothing"),
        ({"code": code[1:]}, "other code files"),
        ({"auto_map": {}}, "another auto_map"),
    ):
        found = judge({**right, **change}, published)
        assert found == [] if said is None else len(found) == 1 and said in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "addon", "4bit"])
def test_demo_in_clean_environments(variant, tmp_path):
    """The commands themselves; for 4 bit in an environment that verify.py makes, with what that needs."""
    base, named, options = tmp_path / "base", [], []
    if variant == "addon":
        QZoomForConditionalGeneration.from_pretrained(DEMO).vlm.save_pretrained(base)
        (base / "LICENSE").write_text("terms")
        named, options = ["--base", "someone/base"], ["--base-folder", str(base)]
    where = [] if variant == "4bit" else ["--python", clean_python()]
    for script, arguments in (
        ("build.py", [str(DEMO), str(tmp_path / "out"), "--variant", variant, *named, *options]),
        ("verify.py", [str(tmp_path / "out"), *where, *options]),
    ):
        command = [sys.executable, str(ROOT / "hub_release" / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith("can be published")
