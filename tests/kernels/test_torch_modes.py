"""The ops under what torch lets a caller set around them: autocast, default dtype and device, forward mode, second
derivatives, fake and meta tensors, and numbers that change between calls of compiled code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_model import BACKENDS as ATTENTION_BACKENDS
from splice_model import normal, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mc_kernels import (
    Edit,
    GistEncodeWeights,
    GistPoolWeights,
    LensScoreWeights,
    RopeSpec,
    SplicePlan,
    collapse_,
    context_attention,
    fused_linear,
    gist_encode,
    gist_pool,
    kv_splice_,
    lens_score,
    refocus_,
    signed_score,
)
from mc_kernels.context_attention.cases import SMALL as ATTENTION
from mc_kernels.fused_linear.cases import Case as LinearCase
from mc_kernels.gist_encode.cases import SMALL as ENCODE
from mc_kernels.gist_pool.cases import SMALL as POOL
from mc_kernels.lens_score.cases import SMALL as LENS
from mc_kernels.refocus.cases import SMALL as REFOCUS
from mc_kernels.registry import IMPLS

Call = Callable[[Tensor, str | None], Tensor]


def _attend() -> tuple[Call, Tensor]:
    args = ATTENTION[1].make(torch.float32)
    q = args.pop("q")
    return lambda x, b: context_attention(x, **args, backend=b), q


def _pool() -> tuple[Call, Tensor]:
    k, v, weights = POOL[0].make(torch.float32)
    return lambda x, b: gist_pool(x, v, weights, backend=b)[0], k


def _encode() -> tuple[Call, Tensor]:
    blocks, weights = ENCODE[0].make(torch.float32)
    return lambda x, b: gist_encode(x, weights, backend=b), blocks


def _score() -> tuple[Call, Tensor]:
    entries, features, queries, weights, legal = LENS[0].make(torch.float32)
    return lambda x, b: lens_score(x, features, queries, weights, legal=legal, backend=b), entries


def _linear() -> tuple[Call, Tensor]:
    args = LinearCase("linear", 3, 24, 32, norm=True, swiglu=True).make(torch.float32)
    x = args.pop("x")
    return lambda x, b: fused_linear(x, **args, backend=b), x


OPS = {
    "context_attention": _attend, "gist_pool": _pool, "gist_encode": _encode, "lens_score": _score,
    "fused_linear": _linear,
}  # fmt: skip
EACH_OP = pytest.mark.parametrize("op", OPS)


def serving(op: str) -> list[str]:
    return [name for name in ("ref", "cpu") if IMPLS[op][name].available() is None]


def gradient(call: Call, x: Tensor, backend: str | None) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(call(leaf, backend).square().sum(), leaf)[0]


@EACH_OP
def test_autocast_changes_nothing(op: str) -> None:
    call, x = OPS[op]()
    for backend in serving(op):
        want = call(x, backend), gradient(call, x, backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = call(x, backend), gradient(call, x, backend)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), backend


@EACH_OP
def test_a_backend_that_is_named_has_gradients(op: str) -> None:
    call, x = OPS[op]()
    want = gradient(call, x, "ref")
    for backend in serving(op):
        torch.testing.assert_close(gradient(call, x, backend), want)


@EACH_OP
def test_a_second_derivative_is_refused(op: str) -> None:
    call, x = OPS[op]()
    for backend in serving(op):
        leaf = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(leaf, backend).square().sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"mc::{op}: expected to be differentiated once"):
            torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)


@EACH_OP
def test_forward_mode_is_refused(op: str) -> None:
    call, x = OPS[op]()
    for backend in serving(op):
        want = call(x, backend)
        with forward_ad.dual_level():
            assert same_bits(call(x, backend), want)
            with pytest.raises(NotImplementedError, match=f"mc::{op}: expected no forward-mode tangents"):
                call(forward_ad.make_dual(x, x), backend)
        with pytest.raises(NotImplementedError, match=f"mc::{op}: expected no forward-mode tangents"):
            torch.func.jvp(lambda at, backend=backend: call(at, backend), (x,), (x,))


@EACH_OP
def test_tensors_that_are_minus_their_memory(op: str) -> None:
    """As the imaginary part of a conjugate is."""
    call, x = OPS[op]()
    for backend in serving(op):
        assert same_bits(call(torch._neg_view(x), backend), call(-x, backend))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("backend", [b for b in ATTENTION_BACKENDS if not b[-1:].isdigit()], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_keeps_to_its_dtypes(dtype: torch.dtype, backend: str) -> None:
    """Whatever torch's default is, which loading a model in bf16 changes."""
    args = ATTENTION[1].make(dtype)
    args |= {"kv_bias": normal(*args["kv_pos"].shape), "return_lse": True, "return_mass": True, "backend": backend}
    leaves = [args[name].requires_grad_() for name in ("q", "kv_bias")]

    def run() -> list[Tensor]:
        out = context_attention(**args)
        return [*out, *torch.autograd.grad(out[0].square().sum(), leaves)]

    want = run()
    for default in (torch.bfloat16, torch.float64):
        with default_dtype(default):
            assert all(same_bits(a, b) for a, b in zip(run(), want, strict=True))


def test_drawn_weights_do_not_depend_on_the_default_dtype() -> None:
    def draw() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        lens = LensScoreWeights.init(8, 2, width=8, n_heads=2, ffn_dim=8, generator=generator)
        return [*lens.tensors(), *GistEncodeWeights.init(8, 8, 1, 2, 8, generator=generator).tensors()]

    want = draw()
    with default_dtype(torch.bfloat16):
        assert all(same_bits(a, b) for a, b in zip(draw(), want, strict=True))
    with torch.device("meta"):
        assert all(x.is_meta for x in LensScoreWeights.init(8, 2, width=8, n_heads=2, ffn_dim=8).tensors())


def _edited(kind: str, k: Tensor, v: Tensor, new: Tensor, rope: RopeSpec, index: Tensor) -> list[Tensor]:
    """A copy of the cache after a splice or a collapse; what is made here is made on the default device."""
    k, v = k.clone(), v.clone()
    if kind == "collapse":
        weights = GistPoolWeights.zeros(2, 3, 1, 4, 8, device="cpu", dtype=torch.float32)
        collapse_(k, v, weights, index, index[:, :1])
        return [k, v]
    slots = list(range(11, -1, -1)) if kind == "slots" else None
    plan = SplicePlan.from_edits(
        12, [Edit(2, 4, 1)], capacity=16, discipline="slots" if slots else "ordered", slots=slots
    )
    if kind == "rows":
        kv_splice_(k, v, new, new, [plan, SplicePlan.from_edits(12, [], capacity=16)], rope, rows=[1, 0])
    else:
        kv_splice_(k, v, new, new, plan, rope)
        assert all(x.is_cpu for x in (plan.slots, plan.new_slots))
    return [k, v]


@pytest.mark.parametrize("kind", ["ordered", "slots", "rows", "collapse"])
def test_edits_do_not_depend_on_the_default_device(kind: str) -> None:
    given = normal(2, 3, 16, 8), normal(2, 3, 16, 8, seed=1), normal(2, 3, 1, 8, seed=2)
    rope, index = RopeSpec(torch.tensor([1.0, 0.1, 0.01, 0.001])), torch.tensor([[1, 2, 3, 4]])
    want = _edited(kind, *given, rope, index)
    with torch.device("meta"):
        got = _edited(kind, *given, rope, index)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


class _Shapes:
    """Makes tensors without numbers: on `meta`, fake, or fake with sizes that are symbols."""

    def __init__(self, kind: str) -> None:
        env = ShapeEnv() if kind == "symbolic" else None
        self.mode = None if kind == "meta" else FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)

    def __call__(self, x: Any) -> Any:
        if dataclasses.is_dataclass(x):
            return dataclasses.replace(x, **{f.name: self(getattr(x, f.name)) for f in dataclasses.fields(x) if f.init})
        if isinstance(x, list | tuple):
            return [self(item) for item in x]
        if not isinstance(x, Tensor):
            return x
        return x.to("meta") if self.mode is None else self.mode.from_tensor(x)

    def within(self) -> Any:
        return torch.device("cpu") if self.mode is None else self.mode


@pytest.mark.parametrize("kind", ["meta", "fake", "symbolic"])
def test_tensors_without_numbers(kind: str) -> None:
    of = _Shapes(kind)
    k, v, pooling = POOL[0].make(torch.float32)
    entries, features, queries, lens, legal = LENS[0].make(torch.float32)
    blocks, net = ENCODE[0].make(torch.float32)
    linear = LinearCase("linear", 3, 24, 32, norm=True).make(torch.float32)
    attention = ATTENTION[1].make(torch.float32)
    with of.within():
        assert len(gist_pool(of(k), of(v), of(pooling))[0].shape) == 5
        assert len(context_attention(**{name: of(x) for name, x in attention.items()}).shape) == 4
        assert len(fused_linear(**{name: of(x) for name, x in linear.items()}).shape) == 2
        assert len(gist_encode(of(blocks), of(net)).shape) == 3
        assert len(lens_score(*map(of, (entries, features, queries, lens)), legal=of(legal)).shape) == 2


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_edits_of_tensors_without_numbers(kind: str) -> None:
    of = _Shapes(kind)
    cache, new, index = normal(2, 3, 16, 8), normal(2, 3, 1, 8), torch.tensor([[1, 2, 3, 4]])
    index = index if kind == "meta" else of(index)  # like a plan, slots are on the host
    plan = SplicePlan.from_edits(12, [Edit(2, 4, 1)], capacity=16)
    weights = of(GistPoolWeights.zeros(2, 3, 1, 4, 8))
    refocus = {name: of(x) for name, x in REFOCUS[0].make(torch.float32).items()}
    with of.within():
        kv_splice_(of(cache), of(cache), of(new), of(new), plan, of(RopeSpec(torch.ones(4))))
        collapse_(of(cache), of(cache), weights, index, index[:, :1])
        refocus_(**refocus)


COMPILED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scale": lambda x, number: context_attention(
        x, x, x, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), None, scale=number
    ),
    "eps": lambda x, number: fused_linear(x, torch.ones(2, 8), norm=torch.ones(8), eps=number),
    "price": lambda x, number: signed_score(x[0, 0, :, :2], price=number),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_with_numbers_that_change(name: str) -> None:
    call, x = COMPILED[name], normal(1, 2, 4, 8)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (0.5, 0.25, 0.125):
        assert same_bits(compiled(x, number), call(x, number))


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", COMPILED)
def test_numbers_are_finite(name: str, number: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        COMPILED[name](normal(1, 2, 4, 8), number)
