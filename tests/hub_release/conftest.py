"""A built repository with everything that one may have, and copies of it that a test may spoil."""

import shutil

import pytest

from tests.release_fixtures import published_folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Shared: nothing may be written there."""
    return published_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture
def folder(published, tmp_path):
    """A copy of it."""
    return shutil.copytree(published, tmp_path / "built")
