"""`context_attention` on a CPU: tiles of queries, their masks, holes, and the backward in the inputs' precision.

Composed of torch's kernels, and with the native library where that serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_model import model
from torch import Tensor

from mc_kernels import RopeSpec, context_attention, native
from mc_kernels.context_attention import cpu
from mc_kernels.testing import assert_within_error_rule, poisoned_empty

LEAVES = ("q", "k", "v", "kv_bias")
# name: batch, query heads, KV heads, head dimension, slots, queries
SHAPES = {
    "grouped": (2, 6, 2, 16, 61, 37),
    "odd": (1, 5, 5, 10, 83, 19),
    "one KV head": (2, 3, 1, 24, 40, 16),
    "few queries": (2, 6, 2, 16, 45, 5),
}


@pytest.fixture(autouse=True, params=["bf16 products", "fp32 products", "native"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both kinds of torch's products on every machine, and tiles small enough that these shapes have several; then the
    library for the forward of few queries."""
    if request.param != "native":
        monkeypatch.setattr(native, "available", lambda: "hidden by the test")
    elif native.available() is not None:
        pytest.skip(f"no native library: {native.available()}")
    monkeypatch.setattr(cpu, "_has_bf16_products", lambda: request.param != "fp32 products")
    monkeypatch.setattr(cpu, "TILE_QUERIES", 16)
    cpu._rows_of.cache_clear()
    yield
    cpu._rows_of.cache_clear()


def arguments(shape: str, dtype: torch.dtype, *, holes: bool = True, bias: bool = False) -> dict[str, Any]:
    """The last queries of a causal sequence in shuffled slots; with holes, a third of the slots hold NaN."""
    b, hq, hkv, d, s, t = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    args: dict[str, Any] = {
        "q": normal(b, hq, t, d), "k": normal(b, hkv, s, d), "v": normal(b, hkv, s, d),
        "q_pos": torch.arange(s - t, s).repeat(b, 1),
        "kv_pos": torch.stack([torch.randperm(s, generator=generator) for _ in range(b)]),
        "rope": RopeSpec.from_theta(1e3, d - d % 4 - 4, interleaved=shape == "odd"),
    }  # fmt: skip
    if bias:
        args["kv_bias"] = normal(b, s).float()
        args["sigma"] = normal(b, s).float().abs()
    if holes:
        empty = torch.rand(b, s, generator=generator) < 1 / 3
        args["kv_pos"][empty] = -1
        for name in "kv":
            args[name].movedim(1, 2)[empty] = float("nan")
    return args


def finite(args: dict[str, Any]) -> dict[str, Any]:
    """The formula multiplies before it masks: it cannot take NaN in a hole."""
    return {n: x.nan_to_num(0.0) if n in ("k", "v") else x for n, x in args.items()}


def gradients(run: Any, args: dict[str, Any], grad: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    leaves = {n: args[n].detach().to(dtype or args[n].dtype).requires_grad_(True) for n in LEAVES if n in args}
    out = run(**{**args, **leaves})
    out.backward(grad.to(out.dtype))
    return {n: x.grad for n, x in leaves.items() if x.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_with_nan_in_the_holes(shape: str, dtype: torch.dtype, bias: bool) -> None:
    args = arguments(shape, dtype, bias=bias)
    clean = finite(args)
    with poisoned_empty():
        got = context_attention(**args, return_lse=True, return_mass=True, backend="cpu")
    exact, plain = model(**clean), model(**clean, exact=False)
    for name, x, want, rival in zip(("out", "lse", "mass"), got, exact, plain, strict=True):
        assert_within_error_rule(x, want, rival, what=name)
    if dtype == torch.float32:
        return  # its backward is the reference
    grad = torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    want = gradients(lambda **a: model(**a)[0], clean, grad, torch.float64)
    rival = gradients(lambda **a: model(**a, exact=False)[0], clean, grad)
    with poisoned_empty():
        found = gradients(lambda **a: context_attention(**a, backend="cpu"), args, grad)
    assert found.keys() == want.keys() == rival.keys()
    for name, x in found.items():
        assert_within_error_rule(x, want[name], rival[name], what=f"grad of {name}")
    empty = args["kv_pos"] < 0
    assert (found["k"].movedim(1, 2)[empty] == 0).all()
    assert (found["v"].movedim(1, 2)[empty] == 0).all()


@pytest.mark.parametrize("queries", [16, 17, 50])
def test_a_causal_prefill_is_cut_at_the_diagonal(queries: int) -> None:
    """Every query is its own key: no tile reads beyond its last query, and only its own block needs a mask."""
    at = torch.arange(queries)[None]
    call = cpu._Call(
        torch.zeros(1, 2, queries, 4), torch.zeros(1, 1, queries, 4), at, at, None, False, 1.0, None, None, 1.0
    )
    tiles = call.rows[0].tiles
    assert [i for i, *_ in tiles] == [0, *(j for _, j, _, _ in tiles[:-1])]
    assert tiles[-1][1] == queries
    assert len(tiles) == -(-queries // 16)
    assert all((clear, seen) == (i + 1, j) for i, j, clear, seen in tiles)
    args = {
        n: torch.randn(1, h, queries, 8, generator=torch.Generator().manual_seed(h)) for n, h in (("q", 4), ("k", 2))
    }
    args["v"] = args["k"].flip(2)
    out = context_attention(**args, q_pos=at, kv_pos=at, rope=None, backend="cpu")
    want = torch.nn.functional.scaled_dot_product_attention(
        args["q"], args["k"], args["v"], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_queries_in_any_order_and_blind_ones() -> None:
    """Positions of queries fall and repeat, as do those of keys; whole tiles see nothing."""
    generator = torch.Generator().manual_seed(0)
    args: dict[str, Any] = {
        "q": torch.randn(2, 4, 48, 8, generator=generator).bfloat16(),
        "k": torch.randn(2, 2, 30, 8, generator=generator).bfloat16(),
        "v": torch.randn(2, 2, 30, 8, generator=generator).bfloat16(),
        "q_pos": torch.randint(-1, 20, (2, 48), generator=generator),
        "kv_pos": torch.randint(-1, 20, (2, 30), generator=generator),
        "rope": RopeSpec.from_theta(1e3, 8),
    }
    args["q_pos"][0, 16:32] = -1
    args["kv_pos"][1] = -1
    out, lse = context_attention(**args, return_lse=True, backend="cpu")
    exact, plain = model(**args), model(**args, exact=False)
    assert_within_error_rule(out, exact[0], plain[0])
    assert_within_error_rule(lse, exact[1], plain[1])
    blind = exact[1] == float("-inf")
    assert blind[0].any()
    assert blind[1].all()
    assert (out[blind] == 0).all()
    found = gradients(lambda **a: context_attention(**a, backend="cpu"), args, torch.ones(2, 4, 48, 8))
    want = gradients(lambda **a: model(**a)[0], args, torch.ones(2, 4, 48, 8), torch.float64)
    rival = gradients(lambda **a: model(**a, exact=False)[0], args, torch.ones(2, 4, 48, 8))
    for name, x in found.items():
        assert_within_error_rule(x, want[name], rival[name], what=f"grad of {name}")
    assert (found["q"][blind] == 0).all()
    assert (found["k"][1] == 0).all()


def test_a_bias_of_minus_infinity_removes_an_entry() -> None:
    args = arguments("grouped", torch.bfloat16, holes=False)
    gone = {**args, "kv_pos": args["kv_pos"].clone()}
    gone["kv_pos"][:, ::2] = -1
    bias = torch.zeros(args["kv_pos"].shape)
    bias[:, ::2] = float("-inf")
    grad = torch.ones_like(args["q"])
    want = gradients(lambda **a: context_attention(**a, backend="cpu"), gone, grad)
    got = gradients(lambda **a: context_attention(**a, backend="cpu"), {**args, "kv_bias": bias}, grad)
    assert (got["k"][:, :, ::2] == 0).all()
    assert got["kv_bias"].isfinite().all()
    for name in "qkv":
        torch.testing.assert_close(got[name], want[name], rtol=2e-2, atol=2e-2)


def test_a_bias_common_to_all_cancels() -> None:
    """It enters lse too: both are terms of log p, and none is rounded before their sum is."""
    args = arguments("grouped", torch.bfloat16, holes=False)
    grad = torch.ones_like(args["q"])
    want = gradients(lambda **a: context_attention(**a, backend="cpu"), args, grad)
    shifted = {**args, "kv_bias": torch.full(args["kv_pos"].shape, 8.0)}
    got = gradients(lambda **a: context_attention(**a, backend="cpu"), shifted, grad)
    for name in "qkv":
        torch.testing.assert_close(got[name], want[name], rtol=2e-2, atol=2e-2)


def test_split_keeps_every_bit() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) * 1e3
    parts = cpu._split(x, torch.bfloat16)
    assert torch.equal(parts.float().sum(-1), x)
    assert not torch.equal(parts[:, :2].float().sum(-1), x)
    assert torch.equal(
        cpu._split(torch.tensor([float("-inf")]), torch.bfloat16)[0].float().sum(), -torch.tensor(torch.inf)
    )


def test_strided_inputs_and_an_expanded_gradient() -> None:
    """A fused projection's views [B, T, H, D] transposed; the gradient of a sum has strides of zero."""
    b, t, d = 2, 40, 16
    heads = torch.randn(b, t, 10, d, generator=torch.Generator().manual_seed(0)).bfloat16().transpose(1, 2)
    q, k, v = heads.split((6, 2, 2), dim=1)
    at = torch.arange(t).repeat(b, 1)
    args: dict[str, Any] = {"q_pos": at, "kv_pos": at, "rope": RopeSpec.from_theta(1e3, d)}
    found = []
    for make in (lambda x: x.detach(), lambda x: x.detach().contiguous()):
        leaves = {n: make(x).requires_grad_(True) for n, x in (("q", q), ("k", k), ("v", v))}
        context_attention(**leaves, **args, backend="cpu").sum().backward()
        found.append([x.grad for x in leaves.values()])
    for x, y in zip(*found, strict=True):
        assert x is not None
        assert torch.equal(x, y)
