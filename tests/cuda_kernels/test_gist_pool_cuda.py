"""`gist_pool` in CUDA C++ against the oracle in fp64; the rival of the error rule is the oracle at the inputs'
precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import BackendError, GistPoolWeights, cuda_backend, gist_pool
from mc_kernels.gist_pool import cuda
from mc_kernels.gist_pool.cases import EMPTY, SMALL, Case
from mc_kernels.gist_pool.ref import gist_pool_ref
from mc_kernels.testing import Guarded, assert_within_error_rule, poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16))
BY_NAME = {case.name: case for case in SMALL + EMPTY}
ODD = dataclasses.replace(BY_NAME["small/odd"], layers=2, kv_heads=2, blocks=3)
GISTS = BY_NAME["small/gists"]
# Emulated threads are slow: few blocks. More pairs than a block of threads takes, heads whose packs leave lanes idle or
# come to more than one a lane, more columns than one chunk of the product.
LARGER = (
    Case("larger/many", 1, 1, 1, 19, 3, 16),
    Case("larger/wide", 1, 1, 1, 2, 2, 160),
    Case("larger/gists", 1, 1, 1, 2, 9, 24, 5),
    Case("larger/unaligned", 1, 1, 1, 2, 3, 41),
)
CASES = (*(dataclasses.replace(c, layers=min(c.layers, 2), batch=min(c.batch, 2)) for c in SMALL), *LARGER)


@pytest.fixture(autouse=True)
def _blocks(device: str) -> None:
    """Two warps a block: enough for a row each and for partial sums to be added up."""
    if device == "cpu":
        cuda_backend.library().emulate(1, 64, 1, 0)


def make(case: Case, data: torch.dtype, device: str, weights: torch.dtype | None = None) -> tuple[Tensor, ...]:
    k, v, pool = case.make(data, device, 0)
    return k, v, *pool.to(dtype=weights or data).tensors()


def check(got: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> None:
    exact = gist_pool_ref(*(x.double() for x in inputs))
    for name, out, e, r in zip(("k_gist", "v_gist"), got, exact, gist_pool_ref(*inputs), strict=True):
        assert out.dtype == inputs[0].dtype
        assert_within_error_rule(out, e, r, what=name)


def call(k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return gist_pool(k, v, GistPoolWeights(*weights), backend="cuda")


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 3]) for i, case in enumerate(CASES)] + [(LARGER[0], d) for d in DTYPES[1:]],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)  # fmt: skip
def test_error_rule(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = make(case, dtype, device)
    with poisoned_empty():
        got = call(*inputs)
    check(got, inputs)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_weights_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    inputs = make(GISTS, dtypes[0], device, dtypes[1])
    check(call(*inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strided_views_in_memory_that_stays_as_it_is(dtype: torch.dtype, device: str) -> None:
    """Heads beside entries, gaps between rows, addresses on nothing but an element; outputs with guards around."""
    inputs = make(ODD, dtype, device)
    k, v = inputs[:2]
    around = [torch.full((2, x.shape[0], x.shape[3], *x.shape[1:3], x.shape[4] + 3), 7.0) for x in (k, v)]
    around = [x.to(device, dtype) for x in around]
    views = [x[1, ..., 1:-2].permute(0, 2, 3, 1, 4) for x in around]
    for view, x in zip(views, (k, v), strict=True):
        view.copy_(x)
    before = [x.clone() for x in around]
    weights = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[2:]]
    want = call(*inputs)
    if device == "cpu":
        guarded = [Guarded(torch.full_like(x, float("nan")), gap=3) for x in want]
        got: Any = cuda.gist_pool_cuda(*views, *weights, out=(guarded[0].view, guarded[1].view))
        for g in guarded:
            g.check()
    else:
        got = call(*views, *weights)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(x, y) for x, y in zip(around, before, strict=True))


@pytest.mark.parametrize("case", EMPTY, ids=lambda c: c.name)
def test_empty(case: Case, device: str) -> None:
    k_gist, v_gist = call(*make(case, torch.float32, device))
    assert k_gist.shape == v_gist.shape == (2 * case.batch, 2, case.blocks, 1, case.head_dim)


def test_extreme_logits(device: str) -> None:
    """Large biases do not overflow, an entry of bias -infinity has no weight, a NaN reaches its own block only."""
    k, v, w, b, m, c = make(ODD, torch.float32, device)
    b[..., 0], b[..., 1], b[..., 2] = 3e4, 2.9999e4, float("-inf")
    k[0, 0, 0, 3, 1] = float("nan")
    got = call(k, v, w, b, m, c)
    for one, exact, rival in zip(
        got, gist_pool_ref(*(x.double() for x in (k, v, w, b, m, c))), gist_pool_ref(k, v, w, b, m, c), strict=True
    ):
        assert torch.equal(one.isnan(), exact.isnan())
        assert one.isnan().any()
        assert not one.isnan().all()
        assert_within_error_rule(one, exact, rival)


def test_order_of_blocks_and_threads_does_not_matter(device: str) -> None:
    inputs = make(LARGER[0], torch.bfloat16, device)
    first = call(*inputs)
    for seed in (2, 3):
        if device == "cpu":
            cuda_backend.library().emulate(seed, 64, 3, 0)
        assert all(torch.equal(x, y) for x, y in zip(first, call(*inputs), strict=True))


def test_gradients_of_a_named_forward(device: str) -> None:
    leaves = [x.requires_grad_() for x in make(GISTS, torch.float32, device)]
    grads = []
    for backend in ("cuda", "ref"):
        out = gist_pool(leaves[0], leaves[1], GistPoolWeights(*leaves[2:]), backend=backend)
        grads.append(torch.autograd.grad(out[0].sum() + out[1].sum(), leaves))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_refusals(device: str) -> None:
    inputs = [x.double() for x in make(GISTS, torch.float32, device)]
    with pytest.raises(BackendError, match="backend 'cuda' cannot serve: fp64 is for the oracle"):
        call(*inputs)
    k = torch.zeros(1, 1, 1, 1, 4096, device=device)
    weights = GistPoolWeights.zeros(1, 1, 1, 1, 4096).to(device=device)
    with pytest.raises(
        ValueError, match=r"k: expected K and D for which .* 163840 bytes of shared memory, got .*D = 4096"
    ):
        gist_pool(k, k.clone(), weights, backend="cuda")
