"""`fused_linear` and `signed_score` of `mc_kernels.array` against the ops on torch's tensors: the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from array_model import EACH_DTYPE, EACH_KIND, check_result, maker
from splice_model import seeded

import mc_kernels as mc
from mc_kernels import array, native
from mc_kernels.fused_linear.cases import EMPTY, SMALL

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")


@EACH_KIND
@EACH_DTYPE
@pytest.mark.parametrize("case", [*SMALL, *EMPTY], ids=lambda c: c.name)
def test_linear(kind: str, dtype: torch.dtype, case: Any) -> None:
    make = maker(kind, dtype)
    args = case.make(dtype)
    want = mc.fused_linear(**args, backend="cpu")
    given = {name: make(x) if isinstance(x, torch.Tensor) else x for name, x in args.items()}
    check_result(array.fused_linear(**given, n_threads=2), want, kind)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@EACH_DTYPE
def test_linear_of_strided_arrays(kind: str, dtype: torch.dtype) -> None:
    """Rows with gaps, transposed, of no outer dimension; a weight among other rows, in a dtype of its own."""
    make, generator = maker(kind, dtype), seeded(1)
    base = torch.randn(4, 3, 40, generator=generator).to(dtype)
    weight = torch.randn(24, 2, 40, generator=generator)[:, 1]
    norm = torch.randn(80, generator=generator).to(dtype)[::2]
    for x in (base.transpose(0, 1), base[::2], base[1, 2], base[:, :0]):
        residual = torch.randn(2, *x.shape[:-1], 24, generator=generator).to(dtype).select(0, 1)
        want = mc.fused_linear(x, weight, norm=norm, residual=residual, backend="cpu")
        got = array.fused_linear(make(x), weight.numpy(), norm=make(norm), residual=make(residual))
        check_result(got, want, kind)


@EACH_KIND
def test_signed(kind: str) -> None:
    make = maker(kind, torch.float32)
    scores = torch.randn(64, 2, generator=seeded(2))
    scores[:4] = torch.tensor([[0.0, 0.0], [0.3, 0.3], [math.nan, 1.0], [1.0, math.inf]])
    legal = torch.rand(64, 2, generator=seeded(3)) < 0.6
    for x, mask, price in (
        (scores, legal, 0.3),
        (scores, None, 0.0),
        (scores.flip(1), None, -0.1),
        (scores[:0], None, 0),
    ):
        want = mc.signed_score(x, mask, price=price)
        got = array.signed_score(make(x), None if mask is None else make(mask), price=price)
        check_result(got, want, kind)


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: array.fused_linear(1.0, ones(2, 3)), TypeError, "x: expected an array"),
        (lambda: array.fused_linear(ones(), ones(2, 3)), ValueError, "x: expected shape [..., E], got float32"),
        (lambda: array.fused_linear(ones(4), ones(2, 3)), ValueError, "weight: expected shape [*, 4], got float32"),
        (lambda: array.fused_linear(ones(3), ones(3, 2).T), ValueError, "weight: expected a contiguous last dimension"),
        (lambda: array.fused_linear(ones(3), ones(2, 3), norm=ones(2)), ValueError, "norm: expected shape [3]"),
        (
            lambda: array.fused_linear(ones(3), ones(2, 3), norm=ones(3), eps=-1.0), ValueError,
            "eps: expected a finite number >= 0, got -1.0",
        ),
        (lambda: array.fused_linear(ones(3), ones(2, 3), bias=ones(3)), ValueError, "bias: expected shape [2]"),
        (lambda: array.fused_linear(ones(3), ones(3, 3), swiglu=True), ValueError, "weight: expected an even"),
        (lambda: array.fused_linear(ones(1, 3), ones(2, 3), residual=ones(2)), ValueError, "residual: expected shape"),
        (
            lambda: array.fused_linear(ones(3), ones(2, 3), residual=ones(2, dtype=np.float16)), TypeError,
            "residual: expected dtype float32 as x, got float16",
        ),
        (lambda: array.fused_linear(ones(3, dtype=np.float64), ones(2, 3)), TypeError, "x: expected dtype"),
        (lambda: array.signed_score(ones(3, 3)), ValueError, "scores: expected shape [N, 2], got"),
        (lambda: array.signed_score(ones(3, 2, dtype=np.float64)), TypeError, "scores: expected dtype float32, got"),
        (lambda: array.signed_score(ones(3, 2), ones(3, 2)), TypeError, "legal: expected dtype bool, got float32"),
        (
            lambda: array.signed_score(ones(3, 2), ones(2, 2, dtype=bool)), ValueError,
            "legal: expected shape [N, 2] with N=3",
        ),
        (lambda: array.signed_score(ones(3, 2), price=math.nan), ValueError, "price: expected a finite number"),
    ],
)  # fmt: skip
def test_what_is_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
