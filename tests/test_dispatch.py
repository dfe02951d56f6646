"""Calls that go past torch's dispatcher, and those that must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mc_kernels import GistPoolWeights, fused_linear, gist_pool, library
from mc_kernels.dispatch import goes_direct


class Seen(TorchDispatchMode):
    """Names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def inputs(requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    return x.requires_grad_(requires_grad), weight


def test_plain_tensors_go_direct_in_every_gradient_mode() -> None:
    args = (*inputs(), None, 1.0, "ref")
    assert goes_direct(args)
    assert goes_direct((torch.nn.Parameter(args[0], requires_grad=False),))
    with torch.no_grad():
        assert goes_direct(args)
        assert goes_direct(inputs(requires_grad=True))
    with torch.inference_mode():
        assert goes_direct(args)
        assert goes_direct((torch.zeros(2),))


def test_whatever_the_dispatcher_serves_goes_through_it() -> None:
    x, weight = inputs()
    assert not goes_direct(inputs(requires_grad=True))
    assert not goes_direct((x.as_subclass(Subclass), weight))
    with torch.inference_mode():
        made_there = torch.zeros(2)
    assert not goes_direct((made_there,))
    with FakeTensorMode():
        assert not goes_direct((x,))
    with Seen():
        assert not goes_direct((x,))
    with TorchFunctionMode():
        assert not goes_direct((x,))
    with profile(activities=[ProfilerActivity.CPU]):
        assert not goes_direct((x,))
    seen = []
    torch.func.vmap(lambda row: (seen.append(goes_direct((row,))), row)[1])(x)
    torch.func.grad(lambda whole: (seen.append(goes_direct((whole,))), whole.sum())[1])(x)
    assert seen == [False, False]


def test_a_direct_call_does_not_reach_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs()
    reached = []
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda self, *args, **kwargs: reached.append(str(self)))
    result = fused_linear(x, weight)
    assert reached == []
    monkeypatch.setattr(library, "goes_direct", lambda args: False)
    assert fused_linear(x, weight) is None
    assert reached == ["mc.fused_linear.default"]
    monkeypatch.undo()
    torch.testing.assert_close(result, x @ weight.T)


@pytest.mark.parametrize("backend", ["ref", None])
def test_direct_and_dispatched_calls_agree(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(2, 3, 4, 8, 16, generator=generator) for _ in "kv")
    weights = GistPoolWeights.zeros(2, 3, 1, 8, 16)
    direct = gist_pool(k, v, weights, backend=backend)
    monkeypatch.setattr(library, "goes_direct", lambda args: False)
    for ours, theirs in zip(direct, gist_pool(k, v, weights, backend=backend), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_modes_and_the_profiler_still_see_the_op() -> None:
    x, weight = inputs()
    with Seen() as seen:
        fused_linear(x, weight)
    assert "mc.fused_linear.default" in seen.names
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        fused_linear(x, weight)
    assert any(event.key == "mc::fused_linear" for event in recorded.key_averages())


def test_gradients_flow_as_before() -> None:
    x, weight = inputs(requires_grad=True)
    fused_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 8))
