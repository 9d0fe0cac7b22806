"""Tests of the server; they need the extra `serve`, and talk to addresses of this machine only."""

import pytest


pytest.importorskip("ray", reason="extra 'serve' is not installed")
