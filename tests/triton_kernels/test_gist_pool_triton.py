"""`gist_pool` in Triton, forward and backward, against the oracle in fp64; the rival of the error rule is the oracle at
the inputs' precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from allocations import NoAllocation
from torch import Tensor

from mc_kernels import BackendError, GistPoolWeights, gist_pool
from mc_kernels.gist_pool.cases import EMPTY, SMALL, Case
from mc_kernels.gist_pool.ref import gist_pool_backward_ref, gist_pool_ref
from mc_kernels.gist_pool.triton_tiling import tiling
from mc_kernels.testing import assert_within_error_rule, max_error, poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Data and weights of different dtypes.
MIXED = ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16))
BY_NAME = {case.name: case for case in SMALL + EMPTY}
# The interpreter runs a program after the other: few of them.
ODD = dataclasses.replace(BY_NAME["small/odd"], layers=2, kv_heads=2, blocks=3)
BATCH = dataclasses.replace(BY_NAME["small/batch"], batch=2, blocks=2)
GISTS = BY_NAME["small/gists"]
# A model's head, more blocks than one program takes with a rest, and a head that wants another tile.
LARGER = (
    Case("larger/64", 2, 2, 1, 3, 32, 64),
    Case("larger/many", 2, 1, 1, 19, 3, 16),
    Case("larger/wide", 1, 1, 1, 65, 2, 80),
    Case("larger/gists", 1, 1, 1, 2, 9, 20, 17),
)
NAMES = ("k", "v", "w", "b", "m", "c")


def ids(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


def each_dtype(cases: Sequence[Case], halves: Sequence[Case]) -> list[tuple[Case, torch.dtype]]:
    """fp32 for all cases, the other dtypes for some: the interpreter is slow."""
    return [(case, dtype) for dtype in DTYPES for case in (cases if dtype == torch.float32 else halves)]


def make(
    case: Case, data: torch.dtype, device: str, weights: torch.dtype | None = None, seed: int = 0
) -> tuple[Tensor, ...]:
    k, v, pool = case.make(data, device, seed)
    return k, v, *pool.to(dtype=weights or data).tensors()


def call(k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return gist_pool(k, v, GistPoolWeights(*weights), backend="triton")


def upstream(inputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    k, w = inputs[0], inputs[2]
    shape = (*k.shape[:3], w.shape[2], k.shape[4])
    gen = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=gen).to(k.device, k.dtype) for _ in range(2))
    return first, second


def check_forward(got: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> None:
    exact = gist_pool_ref(*(x.double() for x in inputs))
    for name, out, e, r in zip(("k_gist", "v_gist"), got, exact, gist_pool_ref(*inputs), strict=True):
        assert out.dtype == inputs[0].dtype
        assert out.is_contiguous()
        assert_within_error_rule(out, e, r, what=name)


def check_gradients(got: tuple[Tensor, ...], up: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> None:
    exact = gist_pool_backward_ref(*(x.double() for x in (*up, *inputs)), True, True)
    rival = gist_pool_backward_ref(*up, *inputs, True, True)
    for name, g, x, e, r in zip(NAMES, got, inputs, exact, rival, strict=True):
        if g.numel():
            assert g.dtype == x.dtype
            assert_within_error_rule(g, e, r, what=f"gradient of {name}")


@pytest.mark.parametrize(("case", "dtype"), each_dtype(SMALL + LARGER, (ODD, BATCH, LARGER[0], LARGER[2])), ids=ids)
def test_error_rule(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = make(case, dtype, device)
    with poisoned_empty():
        got = call(*inputs)
    check_forward(got, inputs)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("case", [GISTS, LARGER[0]], ids=ids)
def test_weights_of_another_dtype(case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    inputs = make(case, dtypes[0], device, dtypes[1])
    up = upstream(inputs)
    with poisoned_empty():
        got = call(*inputs)
        grads = torch.ops.mc.gist_pool_backward(*up, *inputs, True, True, "triton")
    check_forward(got, inputs)
    check_gradients(grads, up, inputs)


@pytest.mark.parametrize(
    ("case", "dtype"), each_dtype((ODD, BATCH, *LARGER[:2], LARGER[3]), (GISTS, LARGER[0])), ids=ids
)
def test_gradients_error_rule(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = make(case, dtype, device, seed=3)
    leaves = [x.clone().requires_grad_() for x in inputs]
    up = upstream(inputs)
    with poisoned_empty():
        grads = torch.autograd.grad(call(*leaves), leaves, up)
    check_gradients(grads, up, inputs)


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_asked_for(flags: tuple[bool, bool], device: str) -> None:
    inputs = make(GISTS, torch.float32, device)
    up = upstream(inputs)
    with poisoned_empty():
        got = torch.ops.mc.gist_pool_backward(*up, *inputs, *flags, "triton")
    full = torch.ops.mc.gist_pool_backward(*up, *inputs, True, True, "triton")
    for part, whole, needed in zip(got, full, (flags[0],) * 2 + (flags[1],) * 4, strict=True):
        assert torch.equal(part, whole if needed else whole.new_empty(0))


def test_the_same_input_gives_the_same_bits(device: str) -> None:
    inputs = make(LARGER[1], torch.bfloat16, device)
    up = upstream(inputs)
    for fn in (lambda: call(*inputs), lambda: torch.ops.mc.gist_pool_backward(*up, *inputs, True, True, "triton")):
        for one, other in zip(fn(), fn(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("case", [ODD, GISTS], ids=ids)
def test_finite_differences(case: Case, device: str) -> None:
    """Along drawn directions, of a loss that is linear in the fp32 outputs."""
    small = dataclasses.replace(case, layers=1, batch=2, kv_heads=1, blocks=2, block_size=5, head_dim=3)
    leaves = [x.clone().requires_grad_() for x in make(small, torch.float32, device)]
    up = upstream(tuple(leaves))

    def loss(*inputs: Tensor) -> Tensor:
        return sum(((o.double() * g.double()).sum() for o, g in zip(call(*inputs), up, strict=True)), torch.zeros(()))

    grads = torch.autograd.grad(call(*leaves), leaves, up)
    gen = torch.Generator().manual_seed(5)
    step = 3e-3
    for i, (name, grad) in enumerate(zip(NAMES, grads, strict=True)):
        direction = torch.randn(grad.shape, generator=gen).to(device)
        with torch.no_grad():
            ends = [
                loss(*(x + sign * step * direction if j == i else x for j, x in enumerate(leaves))) for sign in (1, -1)
            ]
        slope, expected = float((ends[0] - ends[1]) / (2 * step)), float((grad * direction).double().sum())
        assert abs(slope - expected) <= 2e-3 * (1 + abs(expected)), (name, slope, expected)


def test_an_expanded_gradient(device: str) -> None:
    """Of a plain sum, whose gradient has no strides at all."""
    inputs = make(ODD, torch.float32, device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    grads = torch.autograd.grad(out[0].sum() + 2 * out[1].sum(), leaves)
    up = (torch.ones_like(out[0]), torch.full_like(out[1], 2.0))
    check_gradients(grads, up, inputs)


@pytest.mark.parametrize("case", EMPTY, ids=ids)
def test_empty(case: Case, device: str) -> None:
    leaves = [x.requires_grad_() for x in make(case, torch.float32, device)]
    with poisoned_empty():
        k_gist, v_gist = call(*leaves)
        grads = torch.autograd.grad(k_gist.sum() + v_gist.sum(), leaves)
    assert k_gist.shape == v_gist.shape == (leaves[0].shape[0], 2, case.blocks, 1, case.head_dim)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))


def test_strided_views_in_memory_that_stays_as_it_is(device: str) -> None:
    """Heads beside entries, gaps between rows, addresses aligned to nothing but an element; weights not contiguous."""
    inputs = make(ODD, torch.bfloat16, device)
    k, v = inputs[:2]
    around = [torch.full((2, x.shape[0], x.shape[3], *x.shape[1:3], x.shape[4] + 3), 7.0) for x in (k, v)]
    around = [x.to(device, torch.bfloat16) for x in around]
    views = [x[1, ..., 1:-2].permute(0, 2, 3, 1, 4) for x in around]
    for view, x in zip(views, (k, v), strict=True):
        view.copy_(x)
    before = [x.clone() for x in around]
    weights = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[2:]]
    up = upstream(inputs)
    got = call(*views, *weights)
    grads = torch.ops.mc.gist_pool_backward(*up, *views, *weights, True, True, "triton")
    for one, other in zip(got, call(*inputs), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(grads, torch.ops.mc.gist_pool_backward(*up, *inputs, True, True, "triton"), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(x, y) for x, y in zip(around, before, strict=True))


def test_zero_vectors_give_the_constant(device: str) -> None:
    k, v, *weights = make(ODD, torch.float32, device)
    k, v = torch.zeros_like(k), torch.zeros_like(v)
    leaves = [x.requires_grad_() for x in (k, v, *weights)]
    out = call(*leaves)
    c = weights[3].detach()
    assert torch.equal(out[0], c[:, :, None, None, : ODD.head_dim].expand_as(out[0]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out[0].sum() + out[1].square().sum(), leaves))


def test_nan_and_infinity_stay_in_their_block(device: str) -> None:
    k, v, *weights = make(LARGER[1], torch.bfloat16, device)
    clean = call(k, v, *weights)
    for value in (float("nan"), float("inf")):
        broken = v.clone()
        broken[1, 0, 5, 2, 15] = value
        for out, want in zip(call(k, broken, *weights), clean, strict=True):
            assert out[1, 0, 5].isnan().all()
            kept = torch.ones(out.shape[:3], dtype=torch.bool, device=device)
            kept[1, 0, 5] = False
            assert torch.equal(out[kept], want[kept])


def test_a_child_with_a_bias_of_minus_infinity_counts_for_nothing(device: str) -> None:
    k, v, w, b, m, c = make(ODD, torch.float32, device)
    b = b.clone()
    b[..., 5] = float("-inf")
    got = call(k, v, w, b, m, c)
    check_forward(got, (k, v, w, b, m, c))
    k = k.clone()
    k[:, :, :, 5] = 3.0
    assert torch.equal(call(k, v, w, b, m, c)[0], got[0])


@pytest.mark.parametrize("case", [dataclasses.replace(ODD, layers=1, kv_heads=1, blocks=1), EMPTY[0]], ids=ids)
def test_opcheck(case: Case, device: str) -> None:
    inputs = make(case, torch.float32, device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.mc.gist_pool.default, (*leaves, "triton"))
    up = upstream(inputs)
    for flags in ((True, True), (False, True)):
        torch.library.opcheck(torch.ops.mc.gist_pool_backward.default, (*up, *inputs, *flags, "triton"))


def test_compile_forward_and_backward(device: str) -> None:
    def loss(*inputs: Tensor) -> Tensor:
        k_gist, v_gist = call(*inputs)
        return (k_gist * v_gist.sin()).sum()

    leaves = [x.clone().requires_grad_() for x in make(ODD, torch.float32, device)]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), MIXED[0]], ids=str)
def test_memory_of_the_caller(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """What another engine calls: results and scratch are its own, the rest of them stays as it was."""
    from mc_kernels.gist_pool import triton_backward, triton_kernel

    inputs = make(GISTS, dtypes[0], device, dtypes[1])
    up = upstream(inputs)
    k, v, w = inputs[:3]

    def memory(n_bytes: int) -> Tensor:
        return torch.full((n_bytes + 16,), 0xFF, dtype=torch.uint8, device=device)

    space = memory(triton_kernel.gist_pool_workspace(k, w))
    assert (space.numel() == 16) == (dtypes[0] == dtypes[1])
    back = memory(triton_backward.gist_pool_backward_workspace(k, w, True))
    out = tuple(torch.full_like(x, float("nan")) for x in up)
    grads = tuple(torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in inputs)

    def run() -> None:
        triton_kernel.gist_pool_triton(*inputs, out=(out[0], out[1]), workspace=space)
        triton_backward.gist_pool_backward_triton(*up, *inputs, True, True, out=grads, workspace=back)  # type: ignore[arg-type]

    with NoAllocation():
        run()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        v.mul_(0.5)
        before = torch.cuda.memory_allocated()
        graph.replay()
        assert torch.cuda.memory_allocated() == before
    check_forward((out[0], out[1]), inputs)
    check_gradients(grads, up, inputs)
    assert (space[-16:] == 0xFF).all()
    assert (back[-16:] == 0xFF).all()
    if dtypes[0] != dtypes[1]:
        with pytest.raises(ValueError, match="workspace: expected at least"):
            triton_kernel.gist_pool_triton(*inputs, workspace=space[:8])
    with pytest.raises(ValueError, match="v_gist: expected contiguous"):
        triton_kernel.gist_pool_triton(*inputs, out=(out[0], out[1].transpose(0, 1)), workspace=space)


def test_blocks_under_way_fit_shared_memory() -> None:
    """Of the largest that it takes: 128 entries of a head of 128, 64 of one of 256. An A100 gives a program 163 KB, of
    which other tiles need some."""
    staged = {}
    for block_size, dim in ((8, 64), (32, 128), (128, 128), (64, 256)):
        for dtype in DTYPES:
            t = tiling(64, block_size, dim, 1, dtype)
            staged[block_size, dim, dtype] = t.stages
            assert (t.stages - 1) * 2 * t.kp * t.dp * dtype.itemsize <= 144 << 10
    assert staged[32, 128, torch.float32] == staged[128, 128, torch.bfloat16] == 3
    assert staged[128, 128, torch.float32] == 2


def test_what_it_cannot_take(device: str) -> None:
    k, v, weights = ODD.make(torch.float64, device)
    refused: list[tuple[str, Any]] = [
        ("fp64 is for the oracle", lambda: gist_pool(k, v, weights, backend="triton")),
        ("fp64 is for the oracle", lambda: gist_pool(k.float(), v.float(), weights, backend="triton")),
    ]
    large = Case("large", 1, 1, 1, 1, 65, 256)
    refused.append(("K x D <= 16384", lambda: call(*make(large, torch.float32, device))))
    for words, fn in refused:
        with pytest.raises(BackendError, match=words):
            fn()
    assert max_error(*(gist_pool(*large.make(torch.float32, device), backend=b)[0] for b in (None, "ref"))) < 1e-5
