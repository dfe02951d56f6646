"""Kernels are launched while the tensors' device is the current one, whichever was before: what the driver asks of a
caller with several GPUs. Seen without any: the guard is watched, and a launch outside of it is an error."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import collapse_, context_attention, gist_encode, gist_pool, kv_splice_, lens_score
from mc_kernels.context_attention.cases import SMALL as ATTENTION
from mc_kernels.gist_encode.cases import SMALL as ENCODE
from mc_kernels.gist_pool.cases import SMALL as POOL
from mc_kernels.gist_pool.collapse_cases import SMALL as COLLAPSE
from mc_kernels.kv_splice.cases import SMALL as SPLICE
from mc_kernels.lens_score.cases import SMALL as LENS


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    """Names of the kernels that were launched, each within a guard."""
    if device != "cpu":
        pytest.skip("a launch is seen in the interpreter alone")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    guards: list[torch.device] = []
    seen: list[str] = []

    @contextmanager
    def guard(x: Tensor) -> Iterator[None]:
        guards.append(x.device)
        yield
        guards.pop()

    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert guards, f"{self.fn.__name__} is launched on whichever device is current"
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return seen


def _attend() -> Tensor:
    args = ATTENTION[1].make(torch.float32)
    out = context_attention(**args | {"q": args["q"].requires_grad_()}, backend="triton")
    assert isinstance(out, Tensor)
    return out


def _encode() -> Tensor:
    blocks, weights = ENCODE[0].make(torch.float32)
    return gist_encode(blocks.requires_grad_(), weights, backend="triton")


def _pool() -> Tensor:
    k, v, weights = POOL[0].make(torch.float32)
    return gist_pool(k.requires_grad_(), v, weights, backend="triton")[0]


def _score() -> Tensor:
    entries, features, queries, weights, legal = LENS[0].make(torch.float32)
    return lens_score(entries.requires_grad_(), features, queries, weights, legal=legal, backend="triton")


@pytest.mark.parametrize("op", [_attend, _encode, _pool, _score], ids=lambda op: op.__name__)
def test_forward_and_backward(op: Callable[[], Tensor], launches: list[str]) -> None:
    out = op()
    forward = len(launches)
    assert forward
    out.sum().backward()
    assert len(launches) > forward


def test_in_place(launches: list[str]) -> None:
    for case in SPLICE[:2]:
        kv_splice_(**case.make(torch.float32), backend="triton")
    collapse_(**COLLAPSE[0].make(torch.float32), backend="triton")
    assert len(launches) >= 3
