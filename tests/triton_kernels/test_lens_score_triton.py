"""`lens_score` in Triton, forward and backward: the error rule, shapes, strides, gradients, workspaces, compilation."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from allocations import NoAllocation
from torch import Tensor

from mc_kernels import BackendError, LensScoreWeights, lens_score
from mc_kernels.lens_score.cases import EMPTY, SMALL, Case
from mc_kernels.lens_score.ref import score_formula
from mc_kernels.lens_score.weights import SHAPES
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poison_, poisoned_empty

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# entries and queries, weights
DTYPES = ((FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16))
BY_NAME = {case.name: case for case in SMALL}
ONE, TWO = BY_NAME["small/one-pass"], BY_NAME["small/two-passes"]
# Several blocks of entries, tiles and splits of E; none of them whole.
LONG = Case("long", 133, 72, 8, 5, 32, 4, 1, 24, 4, 8, 16)
BROAD = Case("broad", 37, 2065, 3, 3, 40, 2, 1, 24, 3, 5, 16)
MANY_VECTORS = Case("many-vectors", 21, 24, 16, 17, 48, 12, 1, 16, 1, 3, 40)
# Every case in fp32 and in one 16-bit dtype; every dtype, the mixed ones too, on the case with most blocks.
CALLS = [
    *((case, DTYPES[i]) for n, case in enumerate([*SMALL, BROAD, MANY_VECTORS]) for i in (0, 1 + n % 2)),
    *((LONG, dtypes) for dtypes in DTYPES),
]
NAMES = ("entries", "features", "queries", *SHAPES)
Inputs = tuple[LensScoreWeights, Tensor, tuple[Tensor, ...]]


def make(case: Case, data: torch.dtype, weight: torch.dtype, device: str, seed: int = 0) -> Inputs:
    entries, features, queries, weights, legal = case.make(FP32, device, seed)
    weights = weights.to(dtype=weight)
    return weights, legal, (entries.to(data), features, queries.to(data), *weights.tensors())


def call(weights: LensScoreWeights, legal: Tensor | None, inputs: Any, backend: str = "triton") -> Tensor:
    entries, features, queries, *rest = inputs
    return lens_score(entries, features, queries, weights.with_tensors(*rest), legal=legal, backend=backend)


def plain(weights: LensScoreWeights, legal: Tensor | None, inputs: Any) -> Tensor:
    """Torch at the precision of the call: that of entries and weights where it is one, else fp32."""
    dtype = inputs[0].dtype if inputs[0].dtype == inputs[3].dtype else FP32
    return score_formula([x.to(dtype) for x in inputs], legal, weights.n_heads).float()


def exactly(weights: LensScoreWeights, legal: Tensor | None, inputs: Any) -> Tensor:
    return call(weights, legal, [x.double() for x in inputs], "ref")


@pytest.mark.parametrize(("case", "dtypes"), CALLS, ids=str)
def test_error_rule(case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    # fp32 against fp32 compares two roundings; several draws together make that a comparison of sizes, not of luck.
    drawn = []
    for seed in range(1 if FP32 not in dtypes else 4 if case.entries > 1 else 8):
        weights, legal, inputs = make(case, *dtypes, device, seed)
        with poisoned_empty():
            out = call(weights, legal, inputs)
        drawn.append((out, exactly(weights, legal, inputs), plain(weights, legal, inputs)))
        assert out.dtype == FP32
        assert (out[~legal] == 0).all()
    out, exact, rival = (torch.stack(x) for x in zip(*drawn, strict=True))
    assert_within_error_rule(out, exact, rival, what="scores")


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches that are not cut for a GPU with many multiprocessors; workspaces are remembered for those that are."""
    remembered = importlib.import_module("mc_kernels.lens_score.triton_kernel")._workspace_bytes
    monkeypatch.setattr(importlib.import_module("mc_kernels.lens_score.triton_plan"), "_PROGRAMS", 1)
    remembered.cache_clear()
    yield
    remembered.cache_clear()


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_one_split_of_many_blocks(dtype: torch.dtype, device: str) -> None:
    weights, _, inputs = make(LONG, dtype, dtype, device)
    inputs[3].mul_(3)  # far apart logits: the maxima of the blocks differ
    out, exact = call(weights, None, inputs), exactly(weights, None, inputs)
    assert_within_error_rule(out, exact, plain(weights, None, inputs))
    upstream = torch.ones_like(out)
    got, exact = (
        gradients(f, weights, None, x, upstream)[0]
        for f, x in ((call, inputs), (exactly, [x.double() for x in inputs]))
    )
    assert_within_error_rule(got, exact, gradients(plain, weights, None, inputs, upstream)[0])


def gradients(forward: Any, weights: LensScoreWeights, legal: Tensor | None, inputs: Any, upstream: Tensor) -> Any:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = forward(weights, legal, leaves)
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@pytest.mark.parametrize(
    ("case", "dtypes"),
    [(TWO, DTYPES[0]), (LONG, DTYPES[1]), (LONG, DTYPES[2]), (ONE, DTYPES[3]), (MANY_VECTORS, DTYPES[2])],
    ids=str,
)
def test_gradients_error_rule(case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    # As in the forward: fp32 against fp32 compares two roundings.
    drawn: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in NAMES}
    for seed in range(6 if FP32 in dtypes else 1):
        weights, legal, inputs = make(case, *dtypes, device, seed)
        upstream = torch.randn(case.entries, 2, generator=torch.Generator().manual_seed(seed)).to(device)
        with poisoned_empty():
            got = gradients(call, weights, legal, inputs, upstream)
        exact = gradients(exactly, weights, legal, [x.double() for x in inputs], upstream)
        rival = gradients(plain, weights, legal, inputs, upstream)
        assert [g.dtype for g in got] == [x.dtype for x in inputs]
        for name, *triple in zip(NAMES, got, exact, rival, strict=True):
            drawn[name].append(tuple(triple))
    for name, triples in drawn.items():
        g, e, r = (torch.stack(x) for x in zip(*triples, strict=True))
        assert e.abs().max() > 1e-5
        assert_within_error_rule(g, e, r, what=f"gradient of {name}")


def test_gradients_are_those_of_finite_differences(device: str) -> None:
    weights, legal, inputs = make(TWO, FP32, FP32, device)
    gen = torch.Generator().manual_seed(1)
    upstream = torch.randn(TWO.entries, 2, generator=gen).to(device)
    grads = gradients(call, weights, legal, inputs, upstream)
    directions = [torch.randn(x.shape, generator=gen).to(x) * x.square().mean().sqrt() for x in inputs]
    step = 3e-3

    def along(sign: int) -> Tensor:
        moved = [x + sign * step * v for x, v in zip(inputs, directions, strict=True)]
        return (call(weights, legal, moved).double() * upstream).sum()

    numeric = (along(1) - along(-1)) / (2 * step)
    slope = sum((g.double() * v).sum() for g, v in zip(grads, directions, strict=True))
    assert abs(numeric - slope) < 2e-3 * abs(slope)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_strides_and_guards(dtype: torch.dtype, device: str) -> None:
    weights, legal, inputs = make(LONG, dtype, dtype, device)
    want = call(weights, legal, inputs)
    turned = [x.mT.contiguous().mT if i > 2 and x.dim() > 1 else x for i, x in enumerate(inputs)]
    assert torch.equal(call(weights, legal.T.contiguous().T, turned), want)
    same = inputs[0][:1].expand_as(inputs[0])  # a stride of 0
    assert torch.equal(call(weights, None, (same, *inputs[1:])), call(weights, None, (same.clone(), *inputs[1:])))
    if device == "cuda":
        return  # guards live on the CPU
    guards = [Guarded(x, gap=3, margin=63) for x in inputs]
    views = [g.view for g in guards]
    assert torch.equal(call(weights, legal, views), want)
    upstream = torch.randn(LONG.entries, 2)
    for a, b in zip(*(gradients(call, weights, legal, x, upstream) for x in (views, inputs)), strict=True):
        assert torch.equal(a, b)
    for guard in guards:
        guard.check()


def test_empty(device: str) -> None:
    weights, legal, inputs = make(EMPTY, FP32, FP32, device)
    leaves = [x.requires_grad_() for x in inputs]
    out = call(weights, legal, leaves)
    assert out.shape == (0, 2)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), leaves))


def test_nothing_but_one_entry_query_head_and_column(device: str) -> None:
    case = Case("ones", 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1)
    weights, _, inputs = make(case, FP32, FP32, device)
    out = call(weights, None, inputs)
    assert max_error(out, exactly(weights, None, inputs)) < 1e-6


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_zero_entries_and_great_logits(dtype: torch.dtype, device: str) -> None:
    weights, legal, inputs = make(TWO, dtype, dtype, device)
    with torch.no_grad():
        inputs[0][3], inputs[2][1] = 0, 0
    out = call(weights, legal, inputs)
    assert max_error(out, exactly(weights, legal, inputs)) < (1e-5 if dtype == FP32 else 1e-2)
    sharp = [x * 300 if name in ("read_k", "score_q") else x for name, x in zip(NAMES, inputs, strict=True)]
    out, exact = call(weights, legal, sharp), exactly(weights, legal, sharp)
    assert out.isfinite().all()
    if dtype == FP32:  # in fp16 logits of this size say nothing, and the gradient of a zero entry overflows
        assert max_error(out, exact) <= 1e-4 * float(exact.abs().max())
        grads = gradients(call, weights, legal, inputs, torch.ones_like(out))
        assert all(g.isfinite().all() for g in grads)


def test_a_nan_is_not_lost(device: str) -> None:
    weights, _, (entries, features, queries, *rest) = make(LONG, FP16, FP16, device)
    for row in (0, LONG.entries - 1):
        broken = entries.clone()
        broken[row, 7] = float("nan")
        assert call(weights, None, (broken, features, queries, *rest)).isnan().all()
    marked = features.clone()
    marked[5, 0] = float("nan")
    out = call(weights, None, (entries, marked, queries, *rest))
    assert out[5].isnan().all()
    assert int(out.isnan().sum()) == 2


def test_untrained_scores_are_zero_and_calls_repeat(device: str) -> None:
    weights, legal, inputs = make(LONG, BF16, BF16, device)
    untrained = LONG.untrained().to(device, BF16)
    assert not lens_score(*inputs[:3], untrained, backend="triton").any()
    assert torch.equal(call(weights, legal, inputs), call(weights, legal, inputs))
    upstream = torch.randn(LONG.entries, 2, generator=torch.Generator().manual_seed(0)).to(device)
    first, second = (gradients(call, weights, legal, inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_workspace(dtype: torch.dtype, device: str) -> None:
    """Given memory is used, to its last byte and no further, and what was in it does not matter."""
    kernel = importlib.import_module("mc_kernels.lens_score.triton_kernel")
    weights, legal, inputs = make(TWO, dtype, dtype, device)
    args = (*inputs, legal, weights.n_heads)
    size = kernel.lens_score_workspace(*args)
    memory = torch.full((size + 64,), 0xFF, dtype=torch.uint8, device=device)  # NaN in every dtype
    out = poison_(torch.empty(TWO.entries, 2, device=device))
    with NoAllocation():
        got = kernel.lens_score_triton(*args, out=out, workspace=memory[:size])
    assert got is out
    assert torch.equal(out, call(weights, legal, inputs))
    assert (memory[size:] == 0xFF).all()
    assert not (memory[size // 2 : size] == 0xFF).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph() -> None:
    kernel = importlib.import_module("mc_kernels.lens_score.triton_kernel")
    weights, legal, inputs = make(LONG, BF16, BF16, "cuda")
    args = (*inputs, legal, weights.n_heads)
    workspace = torch.empty(kernel.lens_score_workspace(*args), dtype=torch.uint8, device="cuda")
    out = torch.empty(LONG.entries, 2, device="cuda")
    kernel.lens_score_triton(*args, out=out, workspace=workspace)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.lens_score_triton(*args, out=out, workspace=workspace)
    inputs[0].copy_(make(LONG, BF16, BF16, "cuda", seed=1)[2][0])
    graph.replay()
    assert torch.equal(out, call(weights, legal, inputs))


def test_refused_arguments(device: str) -> None:
    weights, legal, inputs = make(ONE, FP32, FP32, device)
    entries, features, *_ = inputs
    with pytest.raises(BackendError, match="fp64 is for the oracle"):
        call(weights, legal, [entries, features.double(), *inputs[2:]])
    for changes, words in (
        ({"n_heads": 64, "width": 64, "queries": 9}, "at most 512 vectors.* got 64 x 16"),
        ({"head_dim": 257}, "at most 256 hidden units, got 257"),
        ({"n_heads": 32, "width": 32, "queries": 9, "head_dim": 65}, "at most 32768 numbers.* got 32 x 16 x 128"),
    ):
        big = dataclasses.replace(ONE, entries=2, **changes)
        weights, legal, inputs = make(big, FP32, FP32, device)
        with pytest.raises(BackendError, match=words):
            call(weights, legal, inputs)


@pytest.mark.parametrize(("case", "masked"), [(ONE, True), (EMPTY, False)], ids=("masked", "empty"))
def test_opcheck(case: Case, masked: bool, device: str) -> None:
    weights, legal, inputs = make(case, FP32, FP32, device)
    constants = (legal if masked else None, weights.n_heads, "triton")
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.mc.lens_score.default, (*leaves, *constants))
    detached = [x.detach() for x in leaves]
    grad = torch.randn(case.entries, 2, device=device)
    torch.library.opcheck(torch.ops.mc.lens_score_backward.default, (grad, *detached, *constants))


def test_compile_forward_and_backward(device: str) -> None:
    weights, legal, inputs = make(ONE, FP32, FP32, device)

    def loss(*tensors: Tensor) -> Tensor:
        return call(weights, legal, tensors).sin().square().sum()

    leaves = [x.requires_grad_() for x in inputs]
    expected, got = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
