"""Fixtures of the runtime's tests: one tiny model for all, and memories that are closed when a test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import SMALL
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.model import LoadedModel


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    return tiny_model()


@pytest.fixture
def memory(tmp_path: Path, model: LoadedModel) -> Iterator[Callable[..., Session]]:
    """Open a small memory; settings override. `memory("name")` is the directory `name`."""
    opened: list[Session] = []

    def open_memory(name: str = "memory", **settings: Any) -> Session:
        given = settings.pop("model", model)
        session = Session.open(tmp_path / name, given, **SMALL | settings)
        opened.append(session)
        return session

    yield open_memory
    for session in opened:
        session.close()
