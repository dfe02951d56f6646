"""Which of Triton's assemblers is chosen, and that it is before a kernel of ours is compiled."""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Iterator
from typing import Any

import pytest
import triton

from mc_kernels import triton_assembler, triton_backend
from mc_kernels.registry import IMPLS
from mc_kernels.triton_assembler import ENV, use_sound_assembler


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENV, raising=False)
    use_sound_assembler.cache_clear()
    yield
    os.environ.pop(ENV, None)
    use_sound_assembler.cache_clear()


def tools(monkeypatch: pytest.MonkeyPatch, own: str, other: str | None) -> None:
    """Triton with these versions of ptxas."""
    made: dict[str, Any] = {"ptxas": types.SimpleNamespace(path="/own", version=own)}
    if other is not None:
        made["ptxas_blackwell"] = types.SimpleNamespace(path="/other", version=other)
    monkeypatch.setattr(triton, "knobs", types.SimpleNamespace(nvidia=types.SimpleNamespace(**made)))


@pytest.mark.parametrize("own", ["12.9", "13.0"])
def test_a_sound_one_stays(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tools(monkeypatch, own, "12.9")
    assert use_sound_assembler() is None
    assert ENV not in os.environ


def test_the_other_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tools(monkeypatch, "12.8", "12.9")
    assert use_sound_assembler() == os.environ[ENV] == "/other"


@pytest.mark.parametrize("other", [None, "12.8"])
def test_where_there_is_none(
    other: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tools(monkeypatch, "12.8", other)
    with caplog.at_level(logging.WARNING):
        assert use_sound_assembler() is None
    assert ENV not in os.environ
    assert "ptxas 12.8" in caplog.text


def test_what_the_user_names_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tools(monkeypatch, "12.8", "12.9")
    monkeypatch.setenv(ENV, "/own")
    assert use_sound_assembler() is None
    assert os.environ[ENV] == "/own"
    assert "ptxas 12.8" in caplog.text


def test_it_is_chosen_before_kernels_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    seen: list[str] = []
    monkeypatch.setattr(triton_backend, "use_sound_assembler", lambda: seen.append("assembler"))
    module = types.SimpleNamespace(run=lambda: seen.append("kernel"))
    monkeypatch.setattr(triton_backend.importlib, "import_module", lambda _: module)
    call = triton_backend.register_triton("an_op_of_this_test", "a.module", "run")
    try:
        call()
        call()
    finally:
        IMPLS.pop("an_op_of_this_test")
    assert seen == ["assembler", "kernel", "kernel"]


def test_this_triton_has_a_sound_one() -> None:
    """Whatever version is installed here: one that this package would leave its kernels to."""
    use_sound_assembler()
    assert triton_assembler.version(triton.knobs.nvidia.ptxas) >= triton_assembler.SOUND
