"""`lens_score` against the net with every projection written out, its gradients, legality, errors and compilation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mc_kernels import LensScoreWeights, lens_score, signed_score
from mc_kernels.lens_score.cases import EMPTY, SMALL, Case
from mc_kernels.lens_score.weights import SHAPES
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in SMALL}
ONE, TWO = BY_NAME["small/one-pass"], BY_NAME["small/two-passes"]
NAMES = ("entries", "features", "queries", *SHAPES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only adds waiting when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(case: Case) -> str:
    return case.name


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()


def naive(heads: int, legal: Tensor | None, *tensors: Tensor) -> Tensor:
    """The net as its matrices say, nothing absorbed: entries are projected to keys, values and queries [N, d]."""
    entries, features, queries, *weights = tensors
    w = dict(zip(SHAPES, weights, strict=True))

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(0, 1)  # [H, rows, width]

    x, z = unit(entries), F.linear(unit(queries), w["w_in"])
    for i in range(w["read_q"].shape[0]):
        q = split(F.linear(unit(z) * w["read_norm"][i], w["read_q"][i]))
        k, v = split(F.linear(x, w["read_k"][i])), split(F.linear(x, w["read_v"][i]))
        p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        z = z + F.linear((p @ v).transpose(0, 1).flatten(1), w["read_out"][i])
        gate, up = F.linear(unit(z) * w["mlp_norm"][i], w["mlp_gate_up"][i]).chunk(2, -1)
        z = z + F.linear(F.silu(gate) * up, w["mlp_down"][i])
    s = unit(z) * w["score_norm"]
    q, k, v = split(F.linear(x, w["score_q"])), split(F.linear(s, w["score_k"])), split(F.linear(s, w["score_v"]))
    logits = q @ k.mT / math.sqrt(q.shape[-1])  # [H, N, Q]
    attended = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    match = logits.exp().mean(-1).log().T
    inputs = torch.cat((attended, match, F.linear(x, w["direct"]), features.to(x.dtype)), -1)
    scores = F.linear(F.silu(F.linear(inputs, w["head_in"], w["head_bias"])), w["head_out"], w["head_out_bias"])
    return scores if legal is None else scores * legal


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[LensScoreWeights, Tensor, tuple[Tensor, ...]]:
    entries, features, queries, weights, legal = case.make(dtype, "cpu", seed)
    return weights, legal, (entries, features, queries, *weights.tensors())


def call(weights: LensScoreWeights, legal: Tensor | None, *tensors: Tensor) -> Tensor:
    entries, features, queries, *rest = tensors
    return lens_score(entries, features, queries, weights.with_tensors(*rest), legal=legal, backend="ref")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    drawn = []
    for seed in range(16 if dtype == torch.float32 else 1):
        weights, legal, inputs = make(case, dtype, seed)
        with poisoned_empty():
            out = call(weights, legal, *inputs)
        exact = naive(case.n_heads, legal, *(x.double() for x in inputs))
        drawn.append((out, exact, naive(case.n_heads, legal, *inputs)))
        assert out.dtype == torch.float32
        assert out.is_contiguous()
    out, exact, rival = (torch.stack(x) for x in zip(*drawn, strict=True))
    assert_within_error_rule(out, exact, rival, what="scores")


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_absorbed_is_the_same_as_projected(case: Case) -> None:
    weights, legal, inputs = make(case, torch.float64)
    assert max_error(call(weights, legal, *inputs), naive(case.n_heads, legal, *inputs)) < 1e-13
    assert max_error(call(weights, None, *inputs), naive(case.n_heads, None, *inputs)) < 1e-13


def test_entries_are_never_projected() -> None:
    """No tensor with N rows is as wide as d, beyond the entries themselves (E) and the head (narrower than d here)."""
    case = dataclasses.replace(ONE, entries=101, width=512, n_heads=2, ffn_dim=8)
    weights, legal, inputs = make(case, torch.float32)
    shapes: set[tuple[int, ...]] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                shapes.add(tuple(out.shape))
            return out

    with Record():
        call(weights, legal, *inputs)
    streamed = [s for s in shapes if 101 in s]
    assert (101, 2) in streamed
    assert max(math.prod(s) // 101 for s in streamed) <= case.embed_dim < case.width


def test_fp32_weights_on_half_precision_entries() -> None:
    weights, legal, (entries, features, queries, *rest) = make(ONE, torch.float32)
    entries, queries = entries.bfloat16(), queries.bfloat16()
    out = call(weights, legal, entries, features, queries, *rest)
    exact = naive(4, legal, *(x.double() for x in (entries, features, queries, *rest)))
    rival = naive(4, legal, entries.float(), features, queries.float(), *rest)
    assert_within_error_rule(out, exact, rival)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untrained_scores_are_zero(dtype: torch.dtype) -> None:
    entries, features, queries, _, _ = TWO.make(dtype)
    out = lens_score(entries, features, queries, TWO.untrained().to(dtype=dtype))
    assert out.shape == (TWO.entries, 2)
    assert not out.any()


def test_illegal_is_exactly_zero_and_has_no_gradient() -> None:
    weights, legal, inputs = make(ONE, torch.float32)
    inputs = tuple(x.requires_grad_() for x in inputs)
    masked, free = call(weights, legal, *inputs), call(weights, None, *inputs)
    assert (masked[~legal] == 0).all()
    assert torch.equal(masked[legal], free[legal])
    assert free.all()
    (grad,) = torch.autograd.grad(masked.sum(), inputs[1])
    assert not grad[~legal.any(1)].any()
    assert grad[legal.any(1)].any(1).all()


def test_order_of_queries_and_entries_is_immaterial() -> None:
    weights, legal, (entries, features, queries, *rest) = make(TWO, torch.float64)
    out = call(weights, legal, entries, features, queries, *rest)
    turned = call(weights, legal, entries, features, queries.flip(0), *rest)
    assert max_error(turned, out) < 1e-13
    turned = call(weights, legal.flip(0), entries.flip(0), features.flip(0), queries, *rest)
    assert max_error(turned.flip(0), out) < 1e-13


def test_entries_count_by_direction_only_and_zero_is_finite() -> None:
    weights, legal, (entries, features, queries, *rest) = make(TWO, torch.float64)
    out = call(weights, legal, entries, features, queries, *rest)
    assert max_error(call(weights, legal, entries * 7, features, queries * 0.2, *rest), out) < 1e-9
    inputs = [x.clone().requires_grad_() for x in (entries, features, queries, *rest)]
    with torch.no_grad():
        inputs[0][3], inputs[2][1] = 0, 0
    out = call(weights, legal, *inputs)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), inputs))


def test_empty() -> None:
    weights, legal, inputs = make(EMPTY, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    out = call(weights, legal, *leaves)
    assert out.shape == (0, 2)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), leaves))


def test_strided_views_and_guards() -> None:
    weights, legal, inputs = make(ONE, torch.float32)
    guards = [Guarded(x, gap=3) for x in inputs[:3]]
    out = call(weights, legal, *(g.view for g in guards), *inputs[3:])
    assert max_error(out, call(weights, legal, *inputs)) < 1e-6
    for guard in guards:
        assert not guard.view.is_contiguous()
        guard.check()
    columns = legal.T.contiguous().T
    assert torch.equal(call(weights, columns, *inputs), call(weights, legal, *inputs))


@pytest.mark.parametrize("case", [ONE, TWO], ids=ids)
def test_gradcheck(case: Case) -> None:
    small = dataclasses.replace(case, entries=4, embed_dim=5, queries=2, width=6, ffn_dim=3, n_heads=3)
    weights, legal, inputs = make(small, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: call(weights, legal, *x), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [ONE, TWO], ids=ids)
def test_gradients_error_rule(case: Case, dtype: torch.dtype) -> None:
    # fp32 against fp32 compares two roundings; several draws together make that a comparison of sizes, not of luck.
    drawn: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in NAMES}
    for seed in range(6 if dtype == torch.float32 else 1):
        weights, legal, inputs = make(case, dtype, seed)
        upstream = torch.randn(case.entries, 2, generator=torch.Generator().manual_seed(seed))

        def grads(fn: Any, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = fn(*leaves)
            return torch.autograd.grad(out, leaves, upstream.to(out.dtype))

        def ours(*x: Tensor, weights: Any = weights, legal: Any = legal) -> Tensor:
            return call(weights, legal, *x)

        def theirs(*x: Tensor, legal: Any = legal) -> Tensor:
            return naive(case.n_heads, legal, *x)

        with poisoned_empty():
            got = grads(ours, inputs, upstream)
        exact, rival = grads(theirs, tuple(x.double() for x in inputs), upstream), grads(theirs, inputs, upstream)
        for name, g, e, r in zip(NAMES, got, exact, rival, strict=True):
            drawn[name].append((g, e, r))
    for name, triples in drawn.items():
        g, e, r = (torch.stack(x) for x in zip(*triples, strict=True))
        assert e.abs().max() > 1e-5
        assert_within_error_rule(g, e, r, what=f"gradient of {name}")


@pytest.mark.parametrize(
    ("case", "masked"), [(TWO, True), (ONE, False), (EMPTY, True)], ids=("masked", "free", "empty")
)
def test_opcheck(case: Case, masked: bool) -> None:
    weights, legal, inputs = make(case, torch.float32)
    constants = (legal if masked else None, weights.n_heads, "ref")
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.mc.lens_score.default, (*leaves, *constants))
    detached = [x.detach() for x in leaves]
    torch.library.opcheck(
        torch.ops.mc.lens_score_backward.default, (torch.randn(case.entries, 2), *detached, *constants)
    )


def test_compile_forward_and_backward() -> None:
    weights, legal, inputs = make(TWO, torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        entries, features, queries, *rest = tensors
        scores = lens_score(entries, features, queries, weights.with_tensors(*rest), legal=legal)
        return scores.sin().square().sum() + signed_score(scores, legal, price=0.1).sum()

    leaves = [x.requires_grad_() for x in inputs]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(a, b)
