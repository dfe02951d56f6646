"""`gist_pool` against the formula written out, its gradients, shapes, strides, errors and compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mc_kernels import BackendError, GistPoolWeights, gist_pool
from mc_kernels.gist_pool import ref
from mc_kernels.gist_pool.cases import CASES, EMPTY, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in SMALL + EMPTY}
ODD, BATCH, GISTS = BY_NAME["small/odd"], BY_NAME["small/batch"], BY_NAME["small/gists"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only adds waiting when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(case: Case) -> str:
    return case.name


def plain(k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, tensor by tensor in the inputs' dtype: forms x and n, softmax in that dtype."""
    layers = w.shape[0]
    x = torch.cat((k, v), -1).unflatten(0, (layers, -1 if k.shape[0] else 0))
    n = x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
    p = (torch.einsum("lbhnkd,lhgd->lbhngk", n, w) + b[:, None, :, None]).softmax(-1)
    y = torch.einsum("lbhngk,lbhnkd->lbhngd", p, x)
    out = y + torch.einsum("lbhngd,lhde->lbhnge", y, m) + c[:, None, :, None, None]
    k_gist, v_gist = out.flatten(0, 1).chunk(2, -1)
    return k_gist, v_gist


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    k, v, weights = case.make(dtype, "cpu", seed)
    return k, v, *weights.tensors()


def call(k: Tensor, v: Tensor, *weights: Tensor, backend: str | None = "ref") -> tuple[Tensor, Tensor]:
    return gist_pool(k, v, GistPoolWeights(*weights), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    with poisoned_empty():
        got = call(*inputs)
    oracle, same_precision = plain(*(x.double() for x in inputs)), plain(*inputs)
    for name, out, exact, rival in zip(("k_gist", "v_gist"), got, oracle, same_precision, strict=True):
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_within_error_rule(out, exact, rival, what=name)


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_fp64_is_the_formula(case: Case) -> None:
    inputs = make(case, torch.float64)
    for out, exact in zip(call(*inputs), plain(*inputs), strict=True):
        assert max_error(out, exact) < 1e-13


def test_fp32_weights_on_a_half_precision_cache() -> None:
    k, v, *weights = make(BATCH, torch.float32)
    k, v = k.bfloat16(), v.bfloat16()
    oracle = plain(k.double(), v.double(), *(x.double() for x in weights))
    rival = plain(k.float(), v.float(), *weights)
    for out, exact, same in zip(call(k, v, *weights), oracle, rival, strict=True):
        assert out.dtype == torch.bfloat16
        assert_within_error_rule(out, exact, same.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_untrained_is_the_mean(block_size: int, dtype: torch.dtype) -> None:
    k, v, _ = Case("mean", 2, 2, 3, 2, block_size, 8).make(dtype, seed=block_size)
    got = gist_pool(k, v, GistPoolWeights.zeros(2, 3, 2, block_size, 8), backend="ref")
    for out, x in zip(got, (k, v), strict=True):
        mean = x.double().mean(3, keepdim=True).expand(-1, -1, -1, 2, -1)
        # 1/K is exact here, so that only fp32 summation order and one rounding of the output are left.
        tolerance = torch.finfo(dtype).eps * mean.abs() / 2 + 4 * torch.finfo(torch.float32).eps
        assert ((out.double() - mean).abs() <= tolerance).all()


def test_rows_use_the_weights_of_their_layer() -> None:
    k, v, *weights = make(BATCH, torch.float64)
    whole = call(k, v, *weights)
    for row in range(k.shape[0]):
        layer = row // BATCH.batch
        one = call(k[row : row + 1], v[row : row + 1], *(x[layer : layer + 1] for x in weights))
        assert max_error(one[0], whole[0][row : row + 1]) < 1e-13
        assert max_error(one[1], whole[1][row : row + 1]) < 1e-13
    swapped = call(k, v, *(x.flip(0) for x in weights))
    assert max_error(swapped[0], whole[0]) > 1e-3


def test_many_layers_are_tiled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(ODD, torch.float64)
    whole = call(*inputs)
    monkeypatch.setattr(ref, "TILE_ELEMENTS", 1)
    for out, exact in zip(call(*inputs), whole, strict=True):
        assert max_error(out, exact) < 1e-14


@pytest.mark.parametrize("case", EMPTY, ids=ids)
def test_empty(case: Case) -> None:
    inputs = [x.requires_grad_() for x in make(case, torch.float32)]
    k_gist, v_gist = call(*inputs)
    assert k_gist.shape == v_gist.shape == (inputs[0].shape[0], 2, case.blocks, 1, case.head_dim)
    grads = torch.autograd.grad(k_gist.sum() + v_gist.sum(), inputs)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, inputs, strict=True))


def test_zero_vectors_are_finite() -> None:
    k, v, *weights = make(ODD, torch.float32)
    k, v = k.clone(), v.clone()
    k[:, :, 0], v[:, :, 0] = 0, 0
    inputs = [x.requires_grad_() for x in (k, v, *weights)]
    out = call(*inputs)
    # A pooled zero leaves nothing but the constant.
    c = weights[3].detach()
    assert torch.equal(out[0][:, :, 0], c[:, :, None, : ODD.head_dim].expand_as(out[0][:, :, 0]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out[0].sum() + out[1].square().sum(), inputs))


def test_strided_views_and_guards() -> None:
    k, v, *weights = make(ODD, torch.float32)
    guards = [Guarded(k, gap=3), Guarded(v.transpose(1, 2).contiguous(), gap=1)]
    views = guards[0].view, guards[1].view.transpose(1, 2)
    assert not views[0].is_contiguous()
    assert not views[1].is_contiguous()
    for out, exact in zip(call(*views, *weights), call(k.contiguous(), v.contiguous(), *weights), strict=True):
        assert torch.equal(out, exact)
    for guard in guards:
        guard.check()
    broadcast = k[:1].expand(k.shape)
    assert (
        max_error(call(broadcast, broadcast, *weights)[0], call(broadcast.clone(), broadcast.clone(), *weights)[0]) == 0
    )


@pytest.mark.parametrize("case", [ODD, GISTS, BATCH], ids=ids)
def test_gradcheck(case: Case) -> None:
    small = dataclasses.replace(case, layers=2, kv_heads=1, blocks=2, block_size=5, head_dim=3)
    inputs = [x.requires_grad_() for x in make(small, torch.float64)]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [ODD, GISTS, BATCH, BY_NAME["small/K64"]], ids=ids)
def test_gradients_error_rule(case: Case, dtype: torch.dtype) -> None:
    def grads(fn: Any, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(fn(*leaves), leaves, upstream)

    inputs = make(case, dtype, seed=3)
    gen = torch.Generator().manual_seed(1)
    upstream = tuple(torch.randn(x.shape, generator=gen).to(dtype) for x in call(*inputs))
    with poisoned_empty():
        got = grads(call, inputs, upstream)
    exact = grads(plain, tuple(x.double() for x in inputs), tuple(x.double() for x in upstream))
    rival = grads(plain, inputs, upstream)
    for name, g, e, r in zip(("k", "v", "w", "b", "m", "c"), got, exact, rival, strict=True):
        assert e.abs().max() > 1e-3
        assert_within_error_rule(g, e, r, what=f"gradient of {name}")


@pytest.mark.parametrize("which", ["cache", "weights"])
def test_only_needed_gradients(which: str) -> None:
    def squares(*inputs: Tensor) -> Tensor:
        k_gist, v_gist = call(*inputs)
        return k_gist.square().sum() + v_gist.square().sum()

    inputs = make(ODD, torch.float64)
    every = [x.clone().requires_grad_() for x in inputs]
    full = torch.autograd.grad(squares(*every), every)
    chosen = slice(0, 2) if which == "cache" else slice(2, 6)
    some = list(inputs)
    some[chosen] = [x.clone().requires_grad_() for x in inputs[chosen]]
    part = torch.autograd.grad(squares(*some), some[chosen])
    for a, b in zip(part, full[chosen], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [ODD, GISTS, EMPTY[0]], ids=ids)
def test_opcheck(case: Case) -> None:
    inputs = [x.requires_grad_() for x in make(case, torch.float32)]
    torch.library.opcheck(torch.ops.mc.gist_pool.default, (*inputs, "ref"))
    up = [torch.randn_like(x) for x in call(*inputs)]
    detached = [x.detach() for x in inputs]
    for flags in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.mc.gist_pool_backward.default, (*up, *detached, *flags, "ref"))


def test_compile_forward_and_backward() -> None:
    def loss(k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        k_gist, v_gist = gist_pool(k, v, GistPoolWeights(*weights))
        return (k_gist * v_gist.sin()).sum()

    inputs = [x.requires_grad_() for x in make(ODD, torch.float64)]
    expected = loss(*inputs)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.allclose(got, expected)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert torch.allclose(a, b)


def test_bad_arguments_are_named() -> None:
    k, v, weights = ODD.make(torch.float32)
    w, b, m, c = weights.tensors()
    bad: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "k: expected a tensor", lambda: gist_pool(None, v, weights)),  # type: ignore[arg-type]
        (TypeError, "k: expected dtype", lambda: gist_pool(k.long(), v, weights)),
        (TypeError, "v: expected dtype float32 as k", lambda: gist_pool(k, v.half(), weights)),
        (TypeError, "v: expected device", lambda: gist_pool(k, v.to("meta"), weights)),
        (TypeError, "weights: expected device", lambda: gist_pool(k, v, weights.to("meta"))),
        (TypeError, "weights: expected GistPoolWeights", lambda: gist_pool(k, v, w)),  # type: ignore[arg-type]
        (ValueError, "k: expected shape", lambda: gist_pool(k[0], v, weights)),
        (ValueError, "v: expected shape", lambda: gist_pool(k, v[:, :, :1], weights)),
        (ValueError, "k: expected K >= 1", lambda: gist_pool(k[..., :0, :], v[..., :0, :], weights)),
        (ValueError, "weights.w: expected shape", lambda: gist_pool(k[..., :4], v[..., :4], weights)),
        (ValueError, "weights.w: expected shape", lambda: gist_pool(k[:, :2], v[:, :2], weights)),
        (ValueError, "weights.b: expected shape", lambda: gist_pool(k[..., :6, :], v[..., :6, :], weights)),
        (ValueError, "k: expected R that is a multiple", lambda: gist_pool(k[:2], v[:2], weights)),
        (ValueError, "k: expected a contiguous last", lambda: gist_pool(k.mT.contiguous().mT, v, weights)),
        (ValueError, "v: expected a contiguous last", lambda: gist_pool(k, v.mT.contiguous().mT, weights)),
        (TypeError, "weights.b: expected a tensor", lambda: GistPoolWeights(w, None, m, c)),  # type: ignore[arg-type]
        (TypeError, "weights.m: expected dtype", lambda: GistPoolWeights(w, b, m.half(), c)),
        (TypeError, "weights.c: expected device", lambda: GistPoolWeights(w, b, m, c.to("meta"))),
        (ValueError, "weights.m: expected shape", lambda: GistPoolWeights(w, b, m[..., :4], c)),
        (ValueError, "weights.b: expected shape", lambda: GistPoolWeights(w, b[:, :, :1], m, c)),
        (ValueError, "weights: expected L >= 1", lambda: GistPoolWeights(w[:0], b[:0], m[:0], c[:0])),
        (ValueError, "an even last dimension", lambda: GistPoolWeights(w[..., :9], b, m[..., :9, :9], c[..., :9])),
        (BackendError, "backend", lambda: gist_pool(k, v, weights, backend="abacus")),
    ]
    for kind, words, fn in bad:
        with pytest.raises(kind) as caught:
            fn()
        assert words in str(caught.value), str(caught.value)


def test_weights_round_trip(tmp_path: Path) -> None:
    _, _, weights = ODD.make(torch.bfloat16)
    _, _, other = GISTS.make(torch.bfloat16)
    path = tmp_path / "weights.safetensors"
    save_file(weights.state_dict("level1.") | other.state_dict("level2."), path)
    state = load_file(path)
    for prefix, original in (("level1.", weights), ("level2.", other)):
        back = GistPoolWeights.from_state_dict(state, prefix)
        for a, b in zip(back.tensors(), original.tensors(), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert (weights.layers, weights.kv_heads, weights.n_gists, weights.block_size, weights.head_dim) == (3, 3, 2, 7, 5)
    with pytest.raises(ValueError, match="state: expected the entries b, c, m, w"):
        GistPoolWeights.from_state_dict({key: x for key, x in state.items() if key != "level1.m"}, "level1.")
    with pytest.raises(ValueError, match=r"weights\.b: expected shape"):
        GistPoolWeights.from_state_dict(state | {"level1.b": state["level2.b"]}, "level1.")


def test_cases_count_what_they_make() -> None:
    for case in SMALL:
        k, v, weights = case.make(torch.bfloat16)
        made = [k, v, *weights.tensors(), *gist_pool(k, v, weights, backend="ref")]
        assert case.bytes(torch.bfloat16) == sum(x.numel() * x.element_size() for x in made)
    assert {case.name for case in CASES} >= {"SmolLM2-135M/N1", "SmolLM2-135M/N256", "Llama-3-8B/N256"}
    one, many = CASES[0], CASES[1]
    assert many.flops() == 256 * one.flops() > 0
