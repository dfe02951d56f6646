"""Fixtures of the runtime's tests: one tiny model for all, memories that are closed when a test ends, and `mc`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import SMALL, Run
from tiny import tiny_model

import mc_runtime.opening
from mc_runtime import Session, cli
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


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: LoadedModel, tmp_path: Path) -> Run:
    """`mc` with arguments, in a directory of its own: exit code, output, errors."""
    monkeypatch.setattr(mc_runtime.opening, "load_model", lambda name: model)
    monkeypatch.chdir(tmp_path)

    def mc(*args: object, typed: str | bytes = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mc", *map(str, args)])
        raw = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err

    return mc
