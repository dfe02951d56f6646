"""`gist_encode` against a net written with torch.nn.functional, its gradients, shapes, errors and compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from encode_model import DTYPES, make, plain
from torch import Tensor

from mc_kernels import GistEncodeWeights, gist_encode
from mc_kernels.gist_encode.cases import EMPTY, SMALL, Case
from mc_kernels.gist_encode.weights import SHAPES
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

BY_NAME = {case.name: case for case in SMALL}
ONE, GISTS, ODD = BY_NAME["small/one"], BY_NAME["small/gists"], BY_NAME["small/odd"]
MEAN, CLS = BY_NAME["small/mean"], BY_NAME["small/cls"]
TINY = {
    name: dataclasses.replace(BY_NAME[f"small/{name}"], blocks=2, block_size=3, embed_dim=5, width=4, ffn_dim=3)
    for name in ("odd", "gists", "mean", "cls")
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only adds waiting when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(case: Case) -> str:
    return case.name


def call(case: Case, weights: GistEncodeWeights, blocks: Tensor, *tensors: Tensor) -> Tensor:
    return gist_encode(blocks, weights.with_tensors(*tensors), level=case.level, backend="ref")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    weights, inputs = make(case, dtype)
    with poisoned_empty():
        out = call(case, weights, *inputs)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_within_error_rule(
        out, plain(case, weights, *(x.double() for x in inputs)), plain(case, weights, *inputs), what="gists"
    )


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_fp64_is_the_formula(case: Case) -> None:
    weights, inputs = make(case, torch.float64)
    assert max_error(call(case, weights, *inputs), plain(case, weights, *inputs)) < 1e-13


def test_fp32_weights_on_half_precision_blocks() -> None:
    weights, (blocks, *tensors) = make(ONE, torch.float32)
    blocks = blocks.bfloat16()
    out = call(ONE, weights, blocks, *tensors)
    oracle = plain(ONE, weights, blocks.double(), *(x.double() for x in tensors))
    assert out.dtype == torch.bfloat16
    assert_within_error_rule(out, oracle, plain(ONE, weights, blocks.float(), *tensors).bfloat16())


@pytest.mark.parametrize("pool", ["softmax", "mean", "cls"])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_untrained_is_the_centred_mean(block_size: int, pool: str) -> None:
    case = dataclasses.replace(MEAN, block_size=block_size, pool=pool)
    blocks, _ = case.make(torch.float32)
    weights = case.untrained()
    for level in (1, 2):
        mean = blocks.double().mean(1, keepdim=True)
        centred = mean - weights.mu.double() if level == 1 else mean  # gists are centred already
        expected = centred / centred.pow(2).mean(-1, keepdim=True).sqrt() * case.target_rms
        out = gist_encode(blocks, weights, level=level, backend="ref").double()
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-7)
        rms = out.pow(2).mean(-1).sqrt()
        assert torch.allclose(rms, torch.full_like(rms, case.target_rms), rtol=1e-6, atol=0)


def test_level_two_ignores_mu_and_levels_saturate() -> None:
    weights, (blocks, *_) = make(ODD, torch.float64)
    moved = dataclasses.replace(weights, mu=weights.mu + 1.0)
    assert torch.equal(gist_encode(blocks, weights, level=2), gist_encode(blocks, moved, level=2))
    assert max_error(gist_encode(blocks, weights, level=1), gist_encode(blocks, moved, level=1)) > 1e-3
    last = gist_encode(blocks, weights, level=4)
    assert torch.equal(gist_encode(blocks, weights, level=9), last)
    assert max_error(gist_encode(blocks, weights, level=3), last) > 1e-9


def test_order_in_the_window_matters_and_blocks_are_independent() -> None:
    weights, (blocks, *_) = make(GISTS, torch.float64)
    out = gist_encode(blocks, weights)
    assert max_error(gist_encode(blocks.flip(1), weights), out) > 1e-6
    for i in range(blocks.shape[0]):
        assert max_error(gist_encode(blocks[i : i + 1], weights), out[i : i + 1]) < 1e-14
    assert max_error(out[:, 0], out[:, 1]) > 1e-6


def test_zero_blocks_are_finite() -> None:
    _, trained = GISTS.make(torch.float32)
    for weights in (GISTS.untrained(), trained):
        flat = dataclasses.replace(weights, mu=torch.zeros_like(weights.mu))
        inputs = [x.clone().requires_grad_() for x in (torch.zeros(2, 16, 40), *flat.tensors())]
        out = call(GISTS, flat, *inputs)
        assert out.isfinite().all()
        assert out.any() == bool(weights.w_out.any())
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum() + out.sum(), inputs))


def test_empty() -> None:
    weights, inputs = make(EMPTY, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    out = call(EMPTY, weights, *leaves)
    assert out.shape == (0, 2, 24)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), leaves))


def test_strided_views_and_guards() -> None:
    weights, (blocks, *_) = make(ODD, torch.float32)
    expected = gist_encode(blocks, weights, backend="ref")
    guard = Guarded(blocks.transpose(0, 1).contiguous(), gap=3)
    view = guard.view.transpose(0, 1)
    assert not view.is_contiguous()
    assert max_error(gist_encode(view, weights, backend="ref"), expected) < 1e-6
    guard.check()
    # A sliding window over one row of embeddings: overlapping, zero-copy.
    row = blocks[0]
    windows = row.as_strided((3, 4, row.shape[1]), (row.shape[1], row.shape[1], 1))
    assert max_error(gist_encode(windows, weights), gist_encode(windows.clone(), weights)) < 1e-6


@pytest.mark.parametrize("name", TINY)
def test_gradcheck(name: str) -> None:
    weights, inputs = make(TINY[name], torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: call(TINY[name], weights, *x), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [ODD, GISTS, CLS, BY_NAME["small/K64"]], ids=ids)
def test_gradients_error_rule(case: Case, dtype: torch.dtype) -> None:
    def grads(fn: Any, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(fn(case, weights, *leaves), leaves, upstream, allow_unused=True)

    # fp32 against fp32 compares two roundings; several draws together make that a comparison of sizes, not of luck.
    drawn: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(6 if dtype == torch.float32 else 1):
        weights, inputs = make(case, dtype, seed)
        upstream = torch.randn(case.blocks, case.n_gists, case.embed_dim, generator=torch.Generator().manual_seed(seed))
        upstream = upstream.to(dtype)
        with poisoned_empty():
            got = grads(call, inputs, upstream)
        exact = grads(plain, tuple(x.double() for x in inputs), upstream.double())
        rival = grads(plain, inputs, upstream)
        for name, g, e, r in zip(("blocks", *SHAPES), got, exact, rival, strict=True):
            assert g is not None
            if e is None or r is None:
                assert name == "mu"
                assert case.level > 1
                assert not g.any()
            else:
                drawn.setdefault(name, []).append((g, e, r))
    for name, triples in drawn.items():
        g, e, r = (torch.stack(x) for x in zip(*triples, strict=True))
        assert e.abs().max() > 1e-5
        assert_within_error_rule(g, e, r, what=f"gradient of {name}")


@pytest.mark.parametrize("case", [ODD, EMPTY], ids=ids)
def test_opcheck(case: Case) -> None:
    weights, inputs = make(case, torch.float32)
    constants = (case.level, weights.n_heads, weights.pool, weights.rope_theta, weights.target_rms, "ref")
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.mc.gist_encode.default, (*leaves, *constants))
    detached = [x.detach() for x in leaves]
    up = torch.randn(case.blocks, case.n_gists, case.embed_dim)
    torch.library.opcheck(torch.ops.mc.gist_encode_backward.default, (up, *detached, *constants))


def test_compile_forward_and_backward() -> None:
    weights, inputs = make(ODD, torch.float64)

    def loss(blocks: Tensor, *tensors: Tensor) -> Tensor:
        return gist_encode(blocks, weights.with_tensors(*tensors), level=2).sin().square().sum()

    leaves = [x.requires_grad_() for x in inputs]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(a, b)
