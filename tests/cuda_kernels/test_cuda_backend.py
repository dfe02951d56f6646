"""What the ops' host code shares: workspaces that were enough, frequencies in fp64, what is asked of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mc_kernels import cuda_backend

LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library that hands on where a call may work."""
    monkeypatch.setattr(cuda_backend, "library", lambda: type("Library", (), {"Where": lambda *where: where}))
    cuda_backend._enough.clear()
    yield
    cuda_backend._enough.clear()


def asked(needs: list[int]) -> tuple[Callable[[Any], int], list[int | None]]:
    """A call that needs these bytes, one after the other, and what it was given (None: it was asked)."""
    seen: list[int | None] = []

    def call(where: Any) -> int:
        seen.append(None if where is None else where[1])
        if where is not None and where[1] < needs[0]:
            raise ValueError(f"workspace: expected {needs[0]} bytes on a multiple of 16, got {where[1]} bytes")
        return needs[0]

    return call, seen


def test_the_library_is_asked_once_for_a_kind() -> None:
    call, seen = asked([64])
    for kind in ("a", "a", "b", None, None):
        cuda_backend.launch(call, LIKE, None, kind)
    assert seen == [None, 64, 64, None, 64, None, 64, None, 64]


def test_a_call_that_needs_more_is_asked_again() -> None:
    needs = [0]
    call, seen = asked(needs)
    for needs[0] in (0, 0, 32, 16):
        cuda_backend.launch(call, LIKE, None, "a")
    assert seen == [None, 0, 0, 0, None, 32, 32]


def test_another_refusal_stays_one() -> None:
    def call(where: Any) -> int:
        if where is None:
            return 16
        raise ValueError("k: expected something else")

    for _ in range(2):
        with pytest.raises(ValueError, match="k: expected something else"):
            cuda_backend.launch(call, LIKE, None, "a")


def test_kinds_are_bounded() -> None:
    call, _ = asked([16])
    for i in range(cuda_backend.MOST_KINDS + 10):
        cuda_backend.launch(call, LIKE, None, i)
    assert len(cuda_backend._enough) <= cuda_backend.MOST_KINDS


def test_arrays_that_are_right_stay() -> None:
    x = torch.arange(6).view(2, 3)
    assert cuda_backend.array(x, torch.int64) is x
    assert cuda_backend.array(None, torch.int64) is None
    turned = cuda_backend.array(x.t(), torch.int64)
    assert turned is not None
    assert turned.is_contiguous()
    assert cuda_backend.frequencies(x.double()[0]).dtype is torch.float64  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_frequencies_are_converted_once_and_again_after_a_write() -> None:
    x = torch.tensor([1.0, 0.5], device="cuda")
    first = cuda_backend.frequencies(x)
    assert first is not None
    assert first.dtype is torch.float64
    assert cuda_backend.frequencies(x) is first
    x.mul_(2)
    again = cuda_backend.frequencies(x)
    assert again is not None
    assert again.tolist() == [2.0, 1.0]
