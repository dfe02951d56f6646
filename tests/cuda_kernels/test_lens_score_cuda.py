"""`lens_score` in CUDA C++: the error rule, shapes, strides, workspaces, orders of blocks, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import BackendError, LensScoreWeights, cuda_backend, lens_score
from mc_kernels.lens_score import cuda
from mc_kernels.lens_score.cases import EMPTY, SMALL, Case
from mc_kernels.lens_score.ref import score_formula
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BY_NAME = {case.name: case for case in SMALL}
ONE, TWO = BY_NAME["small/one-pass"], BY_NAME["small/two-passes"]
# Several tiles of entries and steps and splits of E, none of them whole; so many vectors that they take two halves.
LONG = Case("long", 133, 72, 8, 5, 16, 4, 1, 8, 4, 8, 8)
BROAD = Case("broad", 37, 337, 2, 3, 8, 2, 1, 8, 3, 5, 8)
MANY_VECTORS = Case("many-vectors", 21, 24, 16, 17, 14, 7, 1, 8, 1, 3, 40)
# More than one chunk of E, group of a head's rows, tile of hidden units; more than eight queries.
WIDE = Case("wide", 70, 1040, 9, 3, 72, 1, 2, 68, 2, 2, 70)
# What fast_kernel.cuh serves: several tiles, steps and chunks of E; two passes; neither direct rows nor whole tiles of
# hidden units; a head of 128.
FAST = Case("fast", 133, 352, 8, 4, 64, 4, 1, 32, 4, 8, 16)
FAST_TWO = Case("fast/two-passes", 70, 64, 5, 9, 64, 2, 2, 96, 3, 7, 20)
FAST_BARE = Case("fast/bare", 9, 32, 1, 0, 128, 1, 1, 32, 7, 0, 24)
FAST_FULL = Case("fast/full", 130, 288, 8, 16, 128, 8, 1, 32, 8, 8, 16)
# More than 512 columns of a row of the queries' side, than four splits of the sums.
FAST_WIDE = Case("fast/wide", 330, 64, 7, 3, 576, 9, 1, 544, 4, 8, 24)
# entries and queries, weights
CALLS = [
    (ONE, FP32, FP32), (ONE, BF16, BF16), (TWO, FP32, FP32), (TWO, FP16, FP16),
    (BY_NAME["small/one-query"], BF16, BF16), (BY_NAME["small/bare-head"], BF16, BF16),
    (BY_NAME["small/one-entry"], FP32, FP32), (BY_NAME["small/sixteen-queries"], FP16, FP16), (LONG, BF16, BF16),
    (LONG, BF16, FP32), (LONG, FP32, FP16), (BROAD, FP32, FP32), (BROAD, BF16, BF16), (MANY_VECTORS, FP16, FP16),
    (WIDE, BF16, BF16), (WIDE, FP32, BF16), (FAST, BF16, BF16), (FAST, FP16, FP16), (FAST_TWO, BF16, BF16),
    (FAST_TWO, FP16, FP16), (FAST_BARE, BF16, BF16), (FAST_FULL, BF16, BF16),
    (FAST_WIDE, FP16, FP16),
]  # fmt: skip
Inputs = tuple[LensScoreWeights, Tensor, tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _blocks(device: str) -> None:
    if device == "cpu":
        cuda_backend.library().emulate(1, 0, 1, 0)


def make(case: Case, data: torch.dtype, weight: torch.dtype, device: str, seed: int = 0) -> Inputs:
    entries, features, queries, weights, legal = case.make(FP32, device, seed)
    weights = weights.to(dtype=weight)
    return weights, legal, (entries.to(data), features, queries.to(data), *weights.tensors())


def call(weights: LensScoreWeights, legal: Tensor | None, inputs: Any, backend: str = "cuda") -> Tensor:
    entries, features, queries, *rest = inputs
    return lens_score(entries, features, queries, weights.with_tensors(*rest), legal=legal, backend=backend)


def check(out: Tensor, weights: LensScoreWeights, legal: Tensor | None, inputs: Any) -> None:
    """The rival is torch at the precision of the call: that of entries and weights where it is one, else fp32. Where
    that is fp32 two roundings are compared, of a few numbers: its error counts as an fp32 rounding at least."""
    dtype = inputs[0].dtype if inputs[0].dtype == inputs[3].dtype else FP32
    rival = score_formula([x.to(dtype) for x in inputs], legal, weights.n_heads).float()
    exact = call(weights, legal, [x.double() for x in inputs], "ref")
    if dtype == FP32:
        assert float((out - exact).abs().max()) <= 16 * torch.finfo(FP32).eps * float(exact.abs().max() + 1)
    else:
        assert_within_error_rule(out, exact, rival, what="scores")


@pytest.mark.parametrize(("case", "data", "weight"), CALLS, ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_error_rule(case: Case, data: torch.dtype, weight: torch.dtype, device: str) -> None:
    weights, legal, inputs = make(case, data, weight, device)
    with poisoned_empty():
        out = call(weights, legal, inputs)
    assert out.dtype == FP32
    assert (out[~legal] == 0).all()
    check(out, weights, legal, inputs)


def test_far_apart_logits(device: str) -> None:
    """Tiles whose maxima differ by more than an exponential of fp32 can say. Logits are in the hundreds, so that a
    rounding of one is an error of some 1e-6 of its weight, in the rival as here: one draw says little (2e-7 to 5e-6 on
    either side), so the rule is asked of the mean over several."""
    errors = []
    for seed in range(6):
        weights, _, inputs = make(LONG, FP32, FP32, device, seed)
        inputs[6].mul_(60)  # read_k
        exact = call(weights, None, [x.double() for x in inputs], "ref")
        rival = score_formula(inputs, None, weights.n_heads)
        out = call(weights, None, inputs)
        assert out.isfinite().all()
        rounding = torch.finfo(FP32).eps * float(exact.abs().max())
        errors.append([max_error(out, exact), 2 * max_error(rival, exact) + rounding])
    got, allowed = torch.tensor(errors).mean(0).tolist()
    assert got <= allowed, errors


@pytest.mark.parametrize("case", [ONE, FAST], ids=lambda x: x.name)
def test_a_zero_entry(case: Case, device: str) -> None:
    weights, legal, inputs = make(case, FP16, FP16, device)
    inputs[0][3] = 0
    out, exact = call(weights, legal, inputs), call(weights, legal, [x.double() for x in inputs], "ref")
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("case", "dtype"), [(ONE, FP32), (ONE, BF16), (FAST_TWO, BF16)], ids=str)
def test_strided_and_unaligned(case: Case, dtype: torch.dtype, device: str) -> None:
    """Rows apart from each other, on nothing but an element; a legal mask and weights of other strides. The fast kernel
    does not take those, and the other one agrees with it to the rounding of operands."""
    small = dataclasses.replace(case, entries=9)
    weights, legal, inputs = make(small, dtype, dtype, device)
    want = call(weights, legal, inputs)
    loose = []
    for x in inputs:
        around = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=x.dtype, device=device)
        around[..., 1:-2] = x
        loose.append(around[..., 1:-2])
    columns = legal.T.contiguous().T
    near = 1e-5 if case is ONE else 2e-2
    torch.testing.assert_close(call(weights, columns, loose), want, rtol=near, atol=near)


def test_the_caller_gives_memory(device: str) -> None:
    """Nothing beyond `out` and the workspace is written; what the workspace held does not matter; too little is
    refused before anything is."""
    small = dataclasses.replace(ONE, entries=70)
    weights, legal, inputs = make(small, BF16, BF16, device)
    flat = (*inputs, legal, weights.n_heads)
    want = call(weights, legal, inputs)
    needed = cuda.lens_score_workspace(*flat)
    if device == "cpu":
        guards = Guarded(torch.full((needed,), 255, dtype=torch.uint8)), Guarded(torch.full((70, 2), 7.0), gap=3)
        workspace, out = guards[0].view, guards[1].view
        assert cuda.lens_score_cuda(*flat, out=out, workspace=workspace) is out
        for g in guards:
            g.check()
    else:
        workspace = torch.full((needed,), 255, dtype=torch.uint8, device=device)
        out = cuda.lens_score_cuda(*flat, workspace=workspace)
    assert torch.equal(out, want)
    before = out.clone()
    with pytest.raises(
        ValueError, match=f"workspace: expected {needed} bytes on a multiple of 16, got {needed - 16} bytes"
    ):
        cuda.lens_score_cuda(*flat, out=out, workspace=workspace[:-16])
    assert torch.equal(out, before)


@pytest.mark.parametrize("case", [LONG, FAST], ids=lambda x: x.name)
def test_order_of_blocks_and_threads_does_not_matter(case: Case, device: str) -> None:
    weights, legal, inputs = make(dataclasses.replace(case, entries=70), BF16, BF16, device)
    first = call(weights, legal, inputs)
    for seed in (2, 3):
        if device == "cpu":
            cuda_backend.library().emulate(seed, 0, 1, 0)
        assert torch.equal(call(weights, legal, inputs), first)


@pytest.mark.parametrize("fault", [1, 2], ids=["grid", "copies"])
@pytest.mark.parametrize(
    ("case", "dtype", "name"), [(ONE, FP32, "lens_score"), (FAST, BF16, "lens_score_fast")], ids=["any", "fast"]
)
def test_a_missing_barrier_is_noticed(case: Case, dtype: torch.dtype, name: str, fault: int, device: str) -> None:
    """One of the grid: a race, whose message names the kernel. A tile that is used before it has come: wrong scores."""
    if device != "cpu":
        pytest.skip("deliberate errors are in the emulated build alone")
    weights, legal, inputs = make(case, dtype, dtype, device)
    want = call(weights, legal, inputs)
    cuda_backend.library().emulate(1, 0, 1, fault)
    if fault == 1:
        with pytest.raises(RuntimeError, match=name + r": block \d, thread \d+: .* of workspace races with thread"):
            call(weights, legal, inputs)
    else:
        assert not torch.equal(call(weights, legal, inputs).nan_to_num(1e9), want)


def test_empty(device: str) -> None:
    weights, legal, inputs = make(EMPTY, FP32, FP32, device)
    assert call(weights, legal, inputs).shape == (0, 2)


def test_refusals(device: str) -> None:
    weights, legal, inputs = make(dataclasses.replace(MANY_VECTORS, width=16, n_heads=8), FP32, FP32, device)
    with pytest.raises(BackendError, match=r"cannot serve: expected at most 128 vectors, .* got 131"):
        call(weights, legal, inputs)
    with pytest.raises(BackendError, match="cannot serve: fp64 is for the oracle"):
        call(weights, legal, [inputs[0].double(), inputs[1], inputs[2].double()[:1], *inputs[3:]])


def test_gradients_of_a_named_forward(device: str) -> None:
    small = dataclasses.replace(ONE, entries=5)
    weights, legal, inputs = make(small, FP32, FP32, device)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grads = [torch.autograd.grad(call(weights, legal, leaves, name).sum(), leaves) for name in ("cuda", "ref")]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
