"""An untrained demo model, shared by the tests of the demo."""

import pytest

from hub_release.demo.backbone.model import build_backbone, demo_config
from hub_release.demo.backbone.tokenizer import SPECIAL_TOKENS, build_tokenizer
from hub_release.demo.checkpoint import attach_branches
from modeling_qzoom.data.drawn.questions import question_corpus


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(question_corpus())


@pytest.fixture
def backbone(tokenizer):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return build_backbone(demo_config(512, ids)).eval()


@pytest.fixture
def model(backbone):
    return attach_branches(backbone)
