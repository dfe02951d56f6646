"""What the tests of the benchmark share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# `bench` is no installed package: make it importable whatever the working directory is.
ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture(scope="session")
def limits() -> Iterator[Any]:
    """Limits measured on buffers so small that it takes no time; the rates mean little."""
    from bench import limits as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "last_level_cache", lambda device: 1 << 18)
        patch.setitem(module.MATRIX, "cpu", 128)
        yield module.Limits(torch.device("cpu"), seconds=0.01)


@pytest.fixture
def tiny_cli(limits: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`bench/run.py` on the cases of `small_cases.py`; call it with further arguments."""
    from small_cases import TINY
    from typer.testing import CliRunner

    from bench import cli, workloads

    monkeypatch.setattr(cli, "Limits", lambda *args, **kwargs: limits)
    for op, case in TINY.items():
        monkeypatch.setitem(workloads.CASES, op, [case])
        monkeypatch.setitem(workloads.QUICK, op, (case.name,))
    command = ["--quick", "--warm", "--seconds", "0.005", "--peers", "none", "--device", "cpu", "--dtype", "fp32"]
    return lambda *more: CliRunner().invoke(cli.app, [*command, *more])
