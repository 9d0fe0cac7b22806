"""The handler of a hosted endpoint: in the built folder, and in an environment that has never heard of us."""

import base64
import io
import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from PIL import Image

from hub_release.build import build, main
from hub_release.checks.folder import check_folder
from tests.release_fixtures import DEMO, ROOT, clean_python


PAGE = ROOT / "examples" / "assets" / "page.png"
QUESTION = "which number is on the yellow star?"
CHILD = """
import json, sys
from importlib.util import find_spec
assert find_spec("modeling_qzoom") is None
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
answer = EndpointHandler(sys.argv[1])(json.loads(sys.stdin.read()))
print(json.dumps(answer))
"""


def page() -> str:
    return base64.b64encode(PAGE.read_bytes()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(DEMO, tmp_path_factory.mktemp("endpoint") / "qzoom-demo", handler=True)


@pytest.fixture(scope="module")
def handler(folder):
    spec = spec_from_file_location("endpoint_handler", folder / "handler.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def test_the_folder_may_hold_the_handler_as_it_is_here_only(folder, tmp_path) -> None:
    assert not any(check_folder(folder).values())
    assert (folder / "requirements.txt").exists()
    assert main([str(folder), str(tmp_path / "again")]) == 0 and not (tmp_path / "again" / "handler.py").exists()
    assert main([str(folder), str(tmp_path / "again"), "--handler", "--force"]) == 0
    with (tmp_path / "again" / "handler.py").open("a") as file:
        file.write("import os\n")
    assert check_folder(tmp_path / "again")["files"] == [
        "handler.py is not as in this package; build again with --handler"
    ]


def test_questions_in_every_form(handler) -> None:
    plain = handler({"inputs": {"question": QUESTION, "image": page()}, "parameters": {"max_new_tokens": 12}})
    assert plain == [{"generated_text": "856"}]
    url = f"data:image/png;base64,{page()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    asked = {"inputs": {"messages": [{"role": "user", "content": parts}]}}
    assert handler(asked) == plain
    assert handler({"inputs": {"question": QUESTION, "images": [url]}}) == plain
    assert handler({"inputs": "hello", "parameters": {"max_new_tokens": 3}})[0]["generated_text"]


def test_reports_and_overlays(handler) -> None:
    parameters = {"zoom": "always", "overlay": True, "crop_max_tokens": 64, "min_tokens": 32, "max_tokens": 64}
    answer = handler({"inputs": {"question": QUESTION, "image": page()}, "parameters": parameters})[0]
    report = answer["zoom_report"]
    assert report["reason"] == "forced" and 0 < report["crop_tokens"] <= 64
    assert Image.open(io.BytesIO(base64.b64decode(report["overlay"]))).size[0] > 100
    never = {"zoom": "never", "report": True}
    report = handler({"inputs": {"question": QUESTION, "image": page()}, "parameters": never})[0]["zoom_report"]
    assert report["reason"] == "off" and "overlay" not in report


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "inputs must be a text"),
        ({"inputs": {"question": 3}}, "inputs must be a text"),
        ({"inputs": {"question": "x", "picture": "y"}}, r"inputs holds \['picture'\]"),
        ({"inputs": {"question": "x", "image": "/etc/passwd"}}, "addresses and paths are not followed"),
        ({"inputs": {"question": "x", "image": "http://127.0.0.1/a.png"}}, "addresses and paths are not followed"),
        ({"inputs": {"question": "x", "image": "aGVsbG8="}}, "cannot be read"),
        ({"inputs": {"messages": []}}, "inputs.messages must be a list"),
        ({"inputs": {"messages": [{"role": "user", "content": [{"type": "video"}]}]}}, "must be of type text"),
        ({"inputs": "x", "parameters": {"beams": 4}}, r"parameters holds \['beams'\]"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 10**6}}, "max_new_tokens must be a whole number"),
        ({"inputs": "x", "parameters": {"zoom": "sometimes"}}, "zoom must be one of"),
    ],
)
def test_malformed_requests_get_a_sentence(handler, data, message) -> None:
    with pytest.raises(ValueError, match=message):
        handler(data)


@pytest.mark.slow
def test_in_an_environment_without_us(folder, tmp_path) -> None:
    asked = {"inputs": {"question": QUESTION, "image": page()}, "parameters": {"report": True}}
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [clean_python(), "-I", "-c", CHILD, str(folder)],
        input=json.dumps(asked),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])[0]
    assert answer["generated_text"] == "856" and answer["zoom_report"]["zoomed"] is True
    assert sys.executable != clean_python()
