"""The tiny model and its helpers live with the runtime's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "runtime"))

from tiny import tiny_model

from mc_runtime.model import LoadedModel


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    return tiny_model()
