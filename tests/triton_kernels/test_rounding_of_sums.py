"""fp32 products as a GPU sums them, one addition after the other: the interpreter's numpy sums in blocks, which errs
less and would hide a chain of thousands of roundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_gist_pool_triton as pooling
import torch
from test_lens_score_triton import BROAD, FP32, call, exactly, make, plain

from mc_kernels.gist_pool.cases import Case
from mc_kernels.gist_pool.ref import gist_pool_backward_ref, gist_pool_ref
from mc_kernels.testing import max_error

Product = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _chained(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a b by fused multiply-adds in the order of the columns."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[-1]):
        total = (total + left[..., k, None] * right[..., None, k, :]).astype(np.float32)
    return total


def _rounded_once(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    return (total + a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)


def _multiply_by(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        return interpreter.TensorHandle(product(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run natively here")
def test_lens_score_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    _multiply_by(_chained, monkeypatch)
    drawn = []
    for seed in range(4):
        weights, legal, inputs = make(BROAD, FP32, FP32, "cpu", seed)
        drawn.append([f(weights, legal, inputs) for f in (call, exactly, plain)])
    out, exact, rival = (torch.stack(x) for x in zip(*drawn, strict=True))
    assert max_error(out, exact) < max_error(rival, exact)  # 0.4 of it; with one chain over the columns 1.4


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run natively here")
def test_gist_pool_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """M's part of a gist is a small correction: the order in which it is summed hardly shows in the result."""
    inputs = pooling.make(Case("wide", 1, 1, 1, 4, 8, 128), FP32, "cpu")
    up = pooling.upstream(inputs)

    exact_inputs = [x.double() for x in (*up, *inputs)]
    exact = (*gist_pool_ref(*exact_inputs[2:]), *gist_pool_backward_ref(*exact_inputs, True, True)[:3])
    errors = []
    for product in (_chained, _rounded_once):
        _multiply_by(product, monkeypatch)
        grads = torch.ops.mc.gist_pool_backward(*up, *inputs, True, True, "triton")[:3]
        got = (*pooling.call(*inputs), *grads)
        errors.append([float((x - e).square().mean().sqrt()) for x, e in zip(got, exact, strict=True)])
    for name, chained, once in zip(("k_gist", "v_gist", "dk", "dv", "dw"), *errors, strict=True):
        assert chained < 1.2 * once, name
