"""`DecoderLayers` against the calls that it is composed of, at every instruction set level; what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import RopeSpec, context_attention, fused_linear, native
from mc_kernels.decoder_layers import CacheSlots, DecoderLayers, LayerWeights
from mc_kernels.testing import Guarded, assert_within_error_rule, poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = [f"cpu-{level}" for level in native.isa_levels(matrix=False)]
pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
LAYERS, HEADS, KV_HEADS, EMBED, FFN, SLOTS = 3, 4, 2, 40, 70, 100
EPS = 1e-5


def normal(seed: int, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def weights(dtype: torch.dtype, dims: int, *, bias: bool = False, qk_norm: bool = False) -> list[LayerWeights]:
    rows = (HEADS + 2 * KV_HEADS) * dims

    def layer(seed: int) -> LayerWeights:
        def gain(part: int, n: int) -> Tensor:
            return (1 + normal(seed + part, n, std=0.2)).to(dtype)

        def matrix(part: int, *shape: int) -> Tensor:
            return normal(seed + part, *shape, std=shape[-1] ** -0.5, dtype=dtype)

        return LayerWeights(
            gain(0, EMBED),
            matrix(1, rows, EMBED),
            normal(seed + 2, rows, std=0.3, dtype=dtype) if bias else None,
            gain(3, dims) if qk_norm else None,
            gain(4, dims) if qk_norm else None,
            matrix(5, EMBED, HEADS * dims),
            normal(seed + 6, EMBED, std=0.3, dtype=dtype) if bias else None,
            gain(7, EMBED),
            matrix(8, 2 * FFN, EMBED),
            matrix(9, EMBED, FFN),
        )

    return [layer(100 * n) for n in range(LAYERS)]


class Step:
    """Entries over a cache with empty slots, each row in slots of its own; one of several entries is padding. The same
    at every call."""

    def __init__(self, dtype: torch.dtype, dims: int = 16, *, batch: int = 2, length: int = 3, biased: bool = True):
        used, filled = 90, 80
        self.x = normal(1, batch, length, EMBED, dtype=dtype)
        data = normal(2, LAYERS, 2, batch, KV_HEADS, SLOTS, dims, dtype=dtype)
        self.k, self.v = Guarded(data[:, 0]), Guarded(data[:, 1])
        kv_pos = torch.arange(used).repeat(batch, 1)
        kv_pos[:, filled:] = -1
        self.slots = normal(4, batch, filled).argsort(1)[:, :length]
        self.positions = filled + torch.arange(length).repeat(batch, 1)
        kv_pos.scatter_(1, self.slots, self.positions)
        if batch * length > 1:
            self.positions[0, 0] = -1
        bias = normal(3, batch, used) if biased else None
        self.cache = CacheSlots(self.k.view, self.v.view, self.slots, kv_pos, bias)

    @property
    def given(self) -> tuple[Tensor, Tensor, CacheSlots]:
        return self.x, self.positions, self.cache

    def check(self) -> None:
        self.k.check()
        self.v.check()


def rope(dims: int, kind: str) -> RopeSpec | None:
    if kind == "none":
        return None
    if kind == "magnitude":
        return RopeSpec(torch.empty(0), attention_scaling=1.1)
    full = RopeSpec.from_theta(10_000.0, dims if kind == "half-split" else dims // 2, interleaved=kind == "pairs")
    return RopeSpec(full.inv_freq, full.interleaved, 1.0 if kind == "half-split" else 1.1)


def one_by_one(
    layers: list[LayerWeights], step: Step, spec: RopeSpec | None, *, linear: Callable[..., Tensor] = fused_linear,
    backend: str | None = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by the ops, and the masses; writes the step's cache."""
    x, cache, masses = step.x, step.cache, []
    batch, length, _ = x.shape
    for n, w in enumerate(layers):
        qkv = linear(x, w.qkv, norm=w.attention_norm, eps=EPS, bias=w.qkv_bias)
        heads = qkv.view(batch, length, HEADS + 2 * KV_HEADS, -1).transpose(1, 2)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = (F.rms_norm(t, t.shape[-1:], g, EPS) for t, g in ((q, w.q_norm), (k, w.k_norm)))
        index = cache.slots[:, None, :, None].expand_as(k)
        cache.k[n].scatter_(2, index, k)
        cache.v[n].scatter_(2, index, v)
        used = cache.kv_pos.shape[1]
        out, mass = context_attention(
            q, cache.k[n][:, :, :used], cache.v[n][:, :, :used], step.positions, cache.kv_pos, spec,
            kv_bias=cache.kv_bias, return_mass=True, backend=backend,
        )  # fmt: skip
        masses.append(mass)
        x = linear(out.transpose(1, 2).flatten(2), w.out, bias=w.out_bias, residual=x)
        inner = linear(x, w.gate_up, norm=w.ffn_norm, eps=EPS, swiglu=True)
        x = linear(inner, w.down, residual=x)
    return x, torch.stack(masses)


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dims", "kind", "bias", "biased", "shape"),
    [
        (64, "half-split", False, True, (1, 1)), (16, "pairs", True, False, (2, 3)), (9, "none", True, True, (3, 11)),
        (8, "magnitude", False, False, (1, 2)),
    ],
)  # fmt: skip
def test_bits_are_those_of_the_ops(
    backend: str, dtype: torch.dtype, dims: int, kind: str, bias: bool, biased: bool, shape: tuple[int, int]
) -> None:
    layers, spec = weights(dtype, dims, bias=bias), rope(dims, kind)
    step, apart = (Step(dtype, dims, batch=shape[0], length=shape[1], biased=biased) for _ in range(2))
    want, want_mass = one_by_one(layers, apart, spec)
    mass = torch.full_like(want_mass, float("nan"))
    with poisoned_empty():
        out = DecoderLayers(layers, eps=EPS, rope=spec)(step.x, step.positions, step.cache, mass=mass)
    assert torch.equal(out, want)
    assert torch.equal(mass, want_mass)
    for got, wanted in ((step.k, apart.k), (step.v, apart.v)):
        assert torch.equal(got.view, wanted.view)
        got.check()


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [0, LAYERS])
def test_the_result_is_normed(backend: str, dtype: torch.dtype, layers: int) -> None:
    call, step, apart = DecoderLayers(weights(dtype, 16), eps=EPS, rope=None), Step(dtype), Step(dtype)
    x = call(apart.x, apart.positions, apart.cache, end=layers)
    gain = (1 + normal(7, EMBED, std=0.2)).to(dtype)
    out = call(step.x, step.positions, step.cache, end=layers, final_norm=gain)
    assert_within_error_rule(out, F.rms_norm(x.double(), (EMBED,), gain.double(), EPS), plain_norm(x, gain))
    strided = torch.stack((gain, gain), 1)[:, 0]
    again = Step(dtype)
    assert torch.equal(call(again.x, again.positions, again.cache, end=layers, final_norm=strided), out)


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "length"), [(LAYERS, 1), (LAYERS, 3), (0, 2)])
def test_logits_are_those_of_the_last_entries(backend: str, dtype: torch.dtype, layers: int, length: int) -> None:
    call = DecoderLayers(weights(dtype, 16), eps=EPS, rope=None)
    head, gain = normal(5, 33, EMBED, std=EMBED**-0.5, dtype=dtype), (1 + normal(7, EMBED, std=0.2)).to(dtype)
    want = call(*Step(dtype, length=length).given, end=layers, final_norm=gain)
    logits = Guarded(torch.full((2, 33), float("nan"), dtype=dtype))
    with poisoned_empty():
        out = call(
            *Step(dtype, length=length).given, end=layers, final_norm=gain, head=head, logits=logits.view.contiguous()
        )
    assert torch.equal(out, want)
    written = torch.full((2, 33), float("nan"), dtype=dtype)
    for given in (head, torch.cat((head, head), 1)[:, :EMBED]):  # the second: rows that do not lie close together
        call(*Step(dtype, length=length).given, end=layers, final_norm=gain, head=given, logits=written)
        assert torch.equal(written, fused_linear(want[:, -1], head))


@each_level
def test_calls_in_other_forms(backend: str) -> None:
    """Strided numbers, weights of slots in bf16: what the library does not take is brought into its form."""
    layers, spec = weights(torch.float32, 16), rope(16, "half-split")
    call, step = DecoderLayers(layers, eps=EPS, rope=spec), Step(torch.float32)
    bias = step.cache.kv_bias
    assert bias is not None
    bias.copy_(bias.bfloat16())
    want = call(*step.given)

    def strided(x: Tensor) -> Tensor:
        return torch.stack((x, x), -1)[..., 0]

    again = Step(torch.float32)
    cache = again.cache._replace(
        slots=strided(again.slots), kv_pos=strided(again.cache.kv_pos), kv_bias=bias.bfloat16()
    )
    assert torch.equal(call(strided(again.x), strided(again.positions), cache), want)
    assert torch.equal(again.k.view, step.k.view)


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_normed_heads_follow_the_error_rule(backend: str, dtype: torch.dtype) -> None:
    layers, spec = weights(dtype, 16, bias=True, qk_norm=True), rope(16, "half-split")
    steps = []
    for kind in (torch.float64, dtype, dtype):
        steps.append(step := Step(dtype))
        step.x, step.cache = step.x.to(kind), step.cache._replace(k=step.k.view.to(kind), v=step.v.view.to(kind))
    wide = [LayerWeights(*(None if t is None else t.double() for t in w)) for w in layers]
    exact, _ = one_by_one(wide, steps[0], spec, linear=plain_linear, backend="ref")
    rival, _ = one_by_one(layers, steps[1], spec, linear=plain_linear, backend="ref")
    out = DecoderLayers(layers, eps=EPS, rope=spec)(steps[2].x, steps[2].positions, steps[2].cache)
    assert_within_error_rule(out, exact, rival)
    for name in ("k", "v"):
        kept = (getattr(step.cache, name) for step in (steps[2], steps[0], steps[1]))
        assert_within_error_rule(*kept, what=name)


def plain_linear(
    x: Tensor, weight: Tensor, *, norm: Tensor | None = None, eps: float = EPS, bias: Tensor | None = None,
    swiglu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = F.linear(x if norm is None else F.rms_norm(x, x.shape[-1:], norm, eps), weight, bias)
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def test_layers_by_parts_and_threads_give_the_same() -> None:
    layers, spec = weights(torch.bfloat16, 64), rope(64, "half-split")
    call = DecoderLayers(layers, eps=EPS, rope=spec)

    def run(*stops: int) -> tuple[Tensor, Tensor]:
        step = Step(torch.bfloat16, 64, batch=1, length=2)
        x = step.x
        for first, end in zip((0, *stops), (*stops, LAYERS), strict=True):
            x = call(x, step.positions, step.cache, first=first, end=end)
        step.check()
        return x, step.k.view

    want, want_k = run()
    for stops in [(1,), (0,), (1, 2), (LAYERS,)]:
        got, k = run(*stops)
        assert torch.equal(got, want)
        assert torch.equal(k, want_k)
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(got, want) for got, _ in pool.map(lambda _: run(), range(12)))
    finally:
        torch.set_num_threads(1)


def test_weights_that_change_are_seen() -> None:
    layers, spec = weights(torch.float32, 16), rope(16, "half-split")
    call = DecoderLayers(layers, eps=EPS, rope=spec)

    def agrees() -> None:
        both = []
        for fn in (lambda s: call(s.x, s.positions, s.cache), lambda s: one_by_one(layers, s, spec)[0]):
            both.append(fn(Step(torch.float32)))
        assert torch.equal(*both)

    agrees()
    layers[1].qkv.mul_(-0.5)
    agrees()
    layers[2].down.data = normal(99, EMBED, FFN)
    agrees()
    layers[0].ffn_norm.data = layers[0].ffn_norm.bfloat16()
    agrees()
    layers[0].out.data = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"out: expected shape \[40, 64\], got \[3, 3\]"):
        agrees()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickled"])
def test_copies_have_weights_of_their_own(copied: Callable[[Any], Any]) -> None:
    layers, spec, step = weights(torch.float32, 16), rope(16, "half-split"), Step(torch.float32)
    call = DecoderLayers(layers, eps=EPS, rope=spec)
    want = call(step.x, step.positions, step.cache)
    other = copied(call)
    layers[0].out.zero_()
    assert torch.equal(other(step.x, step.positions, step.cache), want)
    assert not torch.equal(call(step.x, step.positions, step.cache), want)


def test_autograd_sees_the_write_and_is_refused() -> None:
    layers, step = weights(torch.float32, 16), Step(torch.float32)
    call = DecoderLayers(layers, eps=EPS, rope=None)
    before = step.k.view._version, step.v.view._version
    call(step.x, step.positions, step.cache)
    assert (step.k.view._version, step.v.view._version) == (before[0] + 1, before[1] + 1)
    layers[1].gate_up.requires_grad_()
    with pytest.raises(ValueError, match="layers: expected no gradient to be required"):
        call(step.x, step.positions, step.cache)
    with torch.no_grad():
        call(step.x, step.positions, step.cache)


def test_a_head_needs_an_entry() -> None:
    call = DecoderLayers(weights(torch.float32, 16), eps=EPS, rope=None)
    for batch, length in ((0, 2), (0, 0), (2, 0)):
        cache = CacheSlots(
            *(torch.zeros(LAYERS, batch, KV_HEADS, 8, 16) for _ in range(2)),
            torch.arange(length).repeat(batch, 1), torch.full((batch, 5), -1),
        )  # fmt: skip
        x, head, logits = normal(1, batch, length, EMBED), torch.ones(9, EMBED), torch.zeros(batch, 9)
        if batch:
            with pytest.raises(ValueError, match="logits: expected at least one entry of each sequence, got none"):
                call(x, cache.slots, cache, head=head, logits=logits)
        else:
            assert call(x, cache.slots, cache, head=head, logits=logits).shape == x.shape


@pytest.mark.parametrize(("batch", "length", "used"), [(0, 2, 5), (2, 0, 5), (1, 2, 0)])
def test_empty_sizes(batch: int, length: int, used: int) -> None:
    call = DecoderLayers(weights(torch.float32, 16), eps=EPS, rope=None)
    k, v = (torch.zeros(LAYERS, batch, KV_HEADS, 8, 16) for _ in range(2))
    slots = torch.arange(length).repeat(batch, 1)
    cache = CacheSlots(k, v, slots, torch.full((batch, used), -1))
    mass = torch.full((LAYERS, batch, used), float("nan"))
    out = call(normal(1, batch, length, EMBED), slots, cache, mass=mass)
    assert out.shape == (batch, length, EMBED)
    assert out.isfinite().all()
    assert (mass == 0).all()
    assert bool(k.any()) == bool(batch * length)
    none = DecoderLayers([], eps=EPS, rope=None)
    x = normal(1, batch, length, EMBED)
    assert torch.equal(none(x, slots, cache._replace(k=k[:0], v=v[:0])), x)


Change = Callable[[dict[str, Any]], None]


def replaced(**changes: Callable[[Any], Any]) -> Change:
    def change(call: dict[str, Any]) -> None:
        for name, fn in changes.items():
            if name in CacheSlots._fields:
                call["cache"] = call["cache"]._replace(**{name: fn(getattr(call["cache"], name))})
            else:
                call[name] = fn(call[name])

    return change


def headed(**changes: Callable[[Any], Any]) -> Change:
    def change(call: dict[str, Any]) -> None:
        call |= {"head": torch.ones(9, EMBED), "logits": torch.zeros(2, 9)}
        replaced(**changes)(call)

    return change


REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "x kind": (replaced(x=lambda t: None), TypeError, "x: expected a tensor"),
    "x dtype": (replaced(x=Tensor.double), TypeError, "x: expected dtype float32, bfloat16, float16"),
    "x gradient": (replaced(x=lambda t: t.requires_grad_()), ValueError, "x: expected no gradient to be required"),
    "x shape": (replaced(x=lambda t: t[..., :39].contiguous()), ValueError, "qkv: expected shape [128, 39]"),
    "positions": (replaced(positions=lambda t: t[:1]), ValueError, "positions: expected shape [B, T]"),
    "positions dtype": (replaced(positions=Tensor.int), TypeError, "positions: expected dtype int64"),
    "k layers": (replaced(k=lambda t: t[:2]), ValueError, "k: expected shape [L, B, Hkv, S, D] with L=3"),
    "k dtype": (replaced(k=Tensor.half), TypeError, "k: expected dtype float32 as x"),
    "k rows": (replaced(k=lambda t: t.mT.contiguous().mT), ValueError, "k: expected a contiguous last dimension"),
    "k repeats": (replaced(k=lambda t: t[:1].expand_as(t)), ValueError, "k: expected a view without overlap"),
    "v": (replaced(v=lambda t: t[:, :, :1]), ValueError, "v: expected shape [L, B, Hkv, S, D]"),
    "v is k": (lambda call: replaced(v=lambda _: call["cache"].k)(call), ValueError, "v: expected memory apart from k"),
    "slots": (replaced(slots=lambda t: t[:, :1]), ValueError, "slots: expected shape [B, T]"),
    "slot": (replaced(slots=lambda t: t + SLOTS), ValueError, "slots: expected 0..99 (S - 1), got 1"),
    "slot -1": (replaced(slots=lambda t: t - SLOTS), ValueError, "slots: expected 0..99 (S - 1), got -"),
    "used": (
        replaced(kv_pos=lambda t: torch.zeros(2, 101, dtype=torch.int64), kv_bias=lambda t: None), ValueError,
        "used: expected 0..100 (S), got 101",
    ),
    "kv_bias": (replaced(kv_bias=lambda t: t[:, 1:]), ValueError, "kv_bias: expected shape [B, used]"),
    "device": (replaced(positions=lambda t: t.to("meta")), TypeError, "positions: expected a CPU tensor, got meta"),
    "heads": (
        lambda call: replaced(k=lambda t: t[:, :, :1].contiguous(), v=lambda t: t[:, :, :1].contiguous())(call),
        ValueError, "out: expected shape [40, 96], got [40, 64]",
    ),
    "range": (replaced(end=lambda _: 4), ValueError, "layers: expected a range within 0..3, got 0..4"),
    "mass": (replaced(mass=lambda _: torch.zeros(2, 2, 90)), ValueError, "mass: expected shape [3, B, used]"),
    "final_norm": (replaced(final_norm=lambda _: torch.ones(39)), ValueError, "final_norm: expected shape [40]"),
    "final_norm dtype": (
        replaced(final_norm=lambda _: torch.ones(EMBED).double()), TypeError, "final_norm: expected dtype"
    ),
    "logits alone": (replaced(logits=lambda _: torch.ones(2, 9)), ValueError, "head: expected a tensor beside logits"),
    "no logits": (replaced(head=lambda _: torch.ones(9, EMBED)), TypeError, "logits: expected a tensor, got NoneType"),
    "head": (headed(head=lambda t: t[:, :39]), ValueError, "head: expected shape [V, 40]"),
    "head dtype": (headed(head=Tensor.double), TypeError, "head: expected dtype"),
    "logits": (headed(logits=lambda t: t[:, :8].contiguous()), ValueError, "logits: expected shape [B, V]"),
    "logits dtype": (headed(logits=Tensor.half), TypeError, "logits: expected dtype float32 as x"),
    "logits strided": (headed(logits=lambda t: t.mT.contiguous().mT), ValueError, "logits: expected a contiguous"),
    "packed head": (
        headed(head_packed=lambda _: torch.zeros(1, 1, 384, dtype=torch.uint8)), ValueError, "packed: expected a weight"
    ),
    "mass dtype": (replaced(mass=lambda _: torch.zeros(3, 2, 90).half()), TypeError, "mass: expected dtype float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str) -> None:
    change, error, words = REFUSED[name]
    step = Step(torch.float32)
    before = step.k.view.clone(), step.v.view.clone()
    call: dict[str, Any] = {"x": step.x, "positions": step.positions, "cache": step.cache}
    call |= {"end": None, "mass": None, "final_norm": None, "head": None, "head_packed": None, "logits": None}
    change(call)
    layers = DecoderLayers(weights(torch.float32, 16), eps=EPS, rope=rope(16, "half-split"))
    with pytest.raises(error) as caught:
        layers(**call)
    assert words in str(caught.value), str(caught.value)
    assert torch.equal(step.k.view, before[0])
    assert torch.equal(step.v.view, before[1])
    step.check()


def test_weights_that_do_not_fit_are_refused() -> None:
    layers, step = weights(torch.float32, 16), Step(torch.float32)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"qkv": torch.ones(130, EMBED)}, ValueError, "qkv: expected (Hq + 2 Hkv) D rows"),
        ({"down": torch.ones(EMBED, FFN + 1)}, ValueError, "down: expected shape [40, 70], got [40, 71]"),
        ({"q_norm": torch.ones(16)}, ValueError, "q_norm: expected q_norm and k_norm, or none of them"),
        ({"ffn_norm": torch.ones(EMBED + 1)}, ValueError, "norm: expected shape [40], got [41]"),
        ({"ffn_norm": torch.ones(EMBED).double()}, TypeError, "ffn_norm: expected dtype"),
        ({"qkv_bias": [0.0]}, TypeError, "qkv_bias: expected a tensor"),
        ({"out": torch.ones(64, EMBED).T}, ValueError, "out: expected a contiguous last dimension"),
        ({"out_bias": torch.ones(EMBED + 1)}, ValueError, "bias: expected shape [40], got [41]"),
        ({"qkv": layers[0].qkv.to("meta")}, TypeError, "qkv: expected a CPU tensor, got meta"),
    ]
    for changes, error, words in cases:
        wrong = [layers[0]._replace(**changes), *layers[1:]]
        with pytest.raises(error) as caught:
            DecoderLayers(wrong, eps=EPS, rope=None)(step.x, step.positions, step.cache)
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0"):
        DecoderLayers(layers, eps=-1.0, rope=None)
    with pytest.raises(ValueError, match="rope: expected at most D/2 = 8 frequencies, got 9"):
        DecoderLayers(layers, eps=EPS, rope=RopeSpec.from_theta(1e4, 18))(step.x, step.positions, step.cache)
