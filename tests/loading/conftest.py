"""Full checkpoints on tiny backbones."""

import pytest

from tests.loading_fixtures import attach, plain_folder
from tests.tiny import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def full(request, tmp_path_factory):
    """(family, folder of a plain VLM, model on it, folder of the full checkpoint)."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    base = plain_folder(family, folder / "base")
    model = attach(base, family)
    model.save_pretrained(folder / "full")
    return family, base, model, folder / "full"


@pytest.fixture(scope="module")
def qwen_full(tmp_path_factory):
    """(folder of a plain Qwen2.5-VL, folder of the full checkpoint)."""
    folder = tmp_path_factory.mktemp("qwen")
    base = plain_folder("qwen2_5_vl", folder / "base")
    attach(base, "qwen2_5_vl").save_pretrained(folder / "full")
    return base, folder / "full"
