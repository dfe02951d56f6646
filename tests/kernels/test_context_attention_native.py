"""`context_attention` in C++ at every instruction set level: drawn calls against the formula, threads, refusals."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attention_model import EXTRAS, LEVELS, model
from hypothesis import given, settings
from hypothesis import strategies as st
from splice_model import same_bits
from torch import Tensor

from mc_kernels import RopeSpec, context_attention, extension, native
from mc_kernels.context_attention import cpu_native
from mc_kernels.context_attention.cases import Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
HALVES = (torch.bfloat16, torch.float16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments in bf16's numbers, in fp32: shapes, positions with holes in any order, features. What no query of a row
    sees holds NaN."""
    seed = draw(st.integers(0, 999))
    generator = seeded(seed)
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    slots = draw(st.one_of(st.integers(0, 300), st.integers(500, 600)))  # blocks of 128 and of 512
    queries = draw(st.one_of(st.integers(1, 16), st.integers(28, 90)))  # tiles of 84 rows
    dim = draw(st.sampled_from([1, 2, 5, 8, 14, 20, 32, 33, 64, 80, 128]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    order = torch.rand(batch, slots, generator=generator).argsort(1)
    q_pos = torch.randint(-1, max(slots, 1), (batch, queries), generator=generator)
    if draw(st.booleans()):  # the last entries' own queries
        q_pos = torch.arange(slots - queries, slots).repeat(batch, 1)
    # Within the tables of phases, far, and beyond the tables.
    offset = draw(st.sampled_from([0, 0, 4000, 10_000_019, 2**29]))
    empty = torch.rand(batch, slots, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    kv_pos = order.masked_fill(empty, -1)
    args: dict[str, Any] = {
        "q": normal(batch, kv_heads * group, queries, dim),
        "k": normal(batch, kv_heads, slots, dim), "v": normal(batch, kv_heads, slots, dim),
        "q_pos": torch.where(q_pos >= 0, q_pos + offset, q_pos),
        "kv_pos": torch.where(kv_pos >= 0, kv_pos + offset, kv_pos),
        "rope": None,
    }  # fmt: skip
    half = draw(st.integers(0, dim // 2))
    if draw(st.booleans()):
        half = dim // 2
    if half:
        freq = torch.rand(half, generator=generator)
        args["rope"] = RopeSpec(freq, draw(st.booleans()), draw(st.sampled_from([1.0, 1.25])))
        if draw(st.booleans()):
            args["sigma"] = normal(batch, slots).abs() * (torch.rand(batch, slots, generator=generator) < 0.7)
    if draw(st.booleans()):
        args["kv_bias"] = normal(batch, slots)
        args["kv_bias"][torch.rand(batch, slots, generator=generator) < 0.3] = -1e4
    return args


def in_bf16(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, **{n: args[n].bfloat16() for n in ("q", "k", "v")}}


def multiplies_bf16(args: dict[str, Any], in_tiles: bool) -> bool:
    """Whether the library multiplies this call in bf16 if it is given so."""
    (_, heads, queries, dim), rope = args["q"].shape, args["rope"]
    level, rows = native.library().cpu_isa(), heads // args["k"].shape[1] * queries
    if level not in ("avx512bf16", "amx", "amx-emulated", "neonbf16"):
        return False
    if in_tiles or rows > 80:  # as measured
        return True
    if level == "neonbf16" or dim not in (64, 128) or (rows < 5 and level != "avx512bf16"):
        return False
    return rope is not None and rope.rotary_dim == dim and not rope.interleaved


def in_memory(args: dict[str, Any], dtype: torch.dtype, layout: str) -> tuple[dict[str, Any], list[Guarded]]:
    """The call on guarded memory of a layout; what no query sees is NaN there."""
    furthest = args["q_pos"].max(1, keepdim=True).values
    hidden = ((args["kv_pos"] < 0) | (args["kv_pos"] > furthest))[:, None, :, None]
    k, v = (args[n].masked_fill(hidden, float("nan")).to(dtype) for n in ("k", "v"))
    out = {**args, "q": args["q"].to(dtype)}
    if layout == "cache":  # [L, 2, B, Hkv, S, D], padded to more slots
        pool = torch.full((2, 2, *k.shape[:2], k.shape[2] + 3, k.shape[3]), float("nan"), dtype=dtype)
        whole = Guarded(pool)
        out["k"], out["v"] = whole.view[1, 0, :, :, 1 : 1 + k.shape[2]], whole.view[1, 1, :, :, 2 : 2 + k.shape[2]]
        out["k"].copy_(k)
        out["v"].copy_(v)
        return out, [whole]
    nhd = layout == "nhd"
    guarded = [Guarded(x.transpose(1, 2) if nhd else x, gap=3) for x in (k, v, out["q"])]
    out["k"], out["v"], out["q"] = (g.view.transpose(1, 2) if nhd else g.view for g in guarded)
    return out, guarded


@pytest.mark.parametrize(("backend", "in_tiles"), [(x, x.endswith("-tiles")) for x in LEVELS], indirect=["backend"])
@settings(max_examples=60, deadline=None)
@given(call=calls(), layout=st.sampled_from(["cache", "gap", "nhd"]), half=st.sampled_from(HALVES))
def test_drawn_calls(call: dict[str, Any], layout: str, half: torch.dtype, backend: str, in_tiles: bool) -> None:
    args, guarded = in_memory(call, torch.float32, layout)
    with poisoned_empty():
        got = context_attention(**args, **EXTRAS, backend=backend)
    want = model(**call)
    finite = want[1][want[1].isfinite()]
    # fp32 scores of the size of lse, and softmax: a few roundings of each.
    allowed = 1e-5 + 3e-7 * float(finite.abs().max() if finite.numel() else 0.0)
    for name, x, y in zip(("out", "lse"), got, want, strict=False):
        assert max_error(x, y) <= allowed, name
    assert max_error(got[2], want[2]) <= allowed * call["q"].shape[1] * call["q"].shape[2]
    seeing = want[1].isfinite().sum((1, 2)).float()
    torch.testing.assert_close(got[2].sum(1), seeing, rtol=1e-5, atol=1e-6)
    # Numbers of 16 bits are widened exactly, and rounded once at the end, or multiplied as they are.
    args, more = in_memory(call, half, layout)
    with poisoned_empty():
        narrow = context_attention(**args, **EXTRAS, backend=backend)
    if half == torch.bfloat16 and multiplies_bf16(call, in_tiles):
        # Queries are rounded when they are scaled, those that nothing turns too: of what products add up to, which may
        # cancel. Turned or not, a logit is at most that large.
        norms = [call[name].norm(dim=-1).flatten().tolist() for name in ("q", "k")]
        logit = math.prod(max(x, default=0.0) for x in norms) * call["q"].shape[-1] ** -0.5
        plainly = model(**in_bf16(call), exact=False)
        for name, got_, want_, plain in zip(("out", "lse", "mass"), narrow, want, plainly, strict=True):
            # The error rule, but an eighth of a rounding at least: of few numbers a rival may have the nearest by luck.
            seen = want_[want_.isfinite()]
            scale = float(seen.abs().max()) if seen.numel() else 0.0
            luck = torch.finfo(half).eps / 8 * max(scale, logit if name == "lse" else 0.0)
            rival = max(2 * max_error(plain, want_), luck)
            assert max_error(got_.to(plain.dtype), want_) <= rival + torch.finfo(plain.dtype).eps * scale, name
    elif half == torch.bfloat16:
        assert same_bits(narrow[0], got[0].to(half))
        assert same_bits(narrow[1], got[1])
        assert same_bits(narrow[2], got[2])
    else:  # where fp16 cannot hold bf16's numbers these are others
        assert max_error(narrow[0], want[0]) <= allowed + 2e-2
    for g in guarded + more:
        g.check()


@each_level
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("group", "queries", "slots"),
    [(1, 1, 1), (2, 1, 47), (3, 1, 701), (4, 1, 130), (3, 3, 200), (5, 1, 33), (4, 4, 129), (1, 17, 31), (5, 7, 300)],
)
def test_heads_of_bf16(group: int, queries: int, slots: int, dim: int, backend: str) -> None:
    """The usual heads, whose products are bf16 where a level has them: queries for every tile and part of one, blocks
    with an odd number of entries, holes that hold NaN, weights and damped keys, positions beyond the tables."""
    for i, offset in enumerate((0, 5000, 2**29)):
        case = Case("x", 2 * group, 2, dim, slots, queries, theta=1e4, batch=2, features=i == 1)
        call = case.make(torch.bfloat16, seed=slots + i)
        call["kv_pos"][1, ::3] = -1
        call = {**call, "q_pos": call["q_pos"] + offset, "kv_pos": call["kv_pos"] + offset * (call["kv_pos"] >= 0)}
        call |= {n: call[n].float() for n in ("q", "k", "v")}
        args, guarded = in_memory(call, torch.bfloat16, "cache")
        with poisoned_empty():
            got = context_attention(**args, **EXTRAS, backend=backend)
        plain = model(**in_bf16(call), exact=False)
        for name, x, want, rival in zip(("out", "lse", "mass"), got, model(**call), plain, strict=True):
            assert_within_error_rule(x, want, rival, what=f"{name}, offset {offset}")
        for g in guarded:
            g.check()


@each_level
def test_mass_where_scores_are_large(backend: str) -> None:
    """The last bit of lse is 0.001 there, the same for all of these queries; mass is a whole probability for each."""
    args = Case("x", 1, 1, 8, 300, 100).make(torch.float32)
    args["q"], args["q_pos"] = args["q"][:, :, :1].expand(-1, -1, 100, -1), torch.full((1, 100), 299)
    for bias in (-1e4, -7777.0, 5432.1, 1e4):
        mass = context_attention(**args, kv_bias=torch.full((1, 300), bias), **EXTRAS, backend=backend)[2]
        torch.testing.assert_close(mass.sum(1), torch.tensor([100.0]), rtol=1e-5, atol=0.0)


@each_level
def test_some_queries_over_several_runs(backend: str) -> None:
    """More than a decode step has, and results of several runs of keys are merged."""
    args = Case("many", 6, 2, 24, 700, 60, theta=1e3).make(torch.float32)
    got, want = context_attention(**args, **EXTRAS, backend=backend), model(**args)
    assert max_error(got[0], want[0]) < 1e-5
    assert max_error(got[1], want[1]) < 1e-5
    assert max_error(got[2], want[2]) < 1e-4


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_are_packed_one_after_the_other(dtype: torch.dtype, backend: str) -> None:
    """More than the workspace holds at once, and queries far beyond the tables of phases while no entry is."""
    args = Case("x", 2, 2, 16, 200_000, 2).make(dtype)
    args["kv_pos"] = torch.where(args["kv_pos"] % 97 == 0, args["kv_pos"] // 97, -1)
    args["kv_pos"][0, ::2] = torch.arange(100_000) % 4000
    args["q_pos"] = torch.tensor([[1000, 2**40]])
    with poisoned_empty():
        got = context_attention(**args, **EXTRAS, backend=backend)
    for x, want, rival in zip(got, model(**args), model(**args, exact=False), strict=True):
        if dtype == torch.float32:
            assert max_error(x, want) < 1e-5
        else:
            assert_within_error_rule(x, want, rival)


@pytest.mark.parametrize("backend", [x for x in LEVELS if not x.endswith("-tiles")][-1:], indirect=True)
def test_mass_of_many_probabilities_does_not_keep_them(backend: str) -> None:
    """Above 2^24 of them even few queries are attended in tiles, whose sums have other bits than one stream's."""
    library = ctypes.CDLL(next(str(p) for p in extension.FOLDER.glob("libmc_kernels.*")))
    for slots, alike in ((130_000, False), (132_000, True)):
        args = Case("x", 64, 8, 4, slots, 2).make(torch.float32)
        usual = context_attention(**args, **EXTRAS, backend=backend)
        library.mc_probe_attention_tiles(ctypes.c_int64(0))
        try:
            tiles = context_attention(**args, **EXTRAS, backend=backend)
        finally:
            library.mc_probe_attention_tiles(ctypes.c_int64(-1))
        assert all(same_bits(x, y) for x, y in zip(usual, tiles, strict=True)) == alike
        for x, y in zip(usual, tiles, strict=True):
            assert max_error(x, y) < 1e-5


@each_level
def test_neither_threads_nor_calls_beside_change_a_result(backend: str) -> None:
    """Several Python threads with different rotations, so that they also race for the tables of phases."""
    calls_ = []
    for i in range(12):
        slots, queries = ((5000, 1), (300, 40), (700, 90))[i % 3]
        case = Case("x", 6, 3, 64, slots + i, queries, theta=1e3 + i % 6, features=i % 2 == 0)
        calls_.append(case.make(torch.bfloat16 if i % 4 > 1 else torch.float32, seed=i))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [context_attention(**args, **EXTRAS, backend=backend) for args in calls_]
        torch.set_num_threads(3)
        together = [context_attention(**args, **EXTRAS, backend=backend) for args in calls_]
        with ThreadPoolExecutor(4) as pool:
            beside = list(pool.map(lambda args: context_attention(**args, **EXTRAS, backend=backend), calls_ * 3))
    finally:
        torch.set_num_threads(before)
    for want, *others in zip(alone, together, beside[:12], beside[12:24], beside[24:], strict=True):
        for got in others:
            assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))


@each_level
@pytest.mark.parametrize(("dim", "dtype"), [(40, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16)], ids=str)
def test_nan_and_infinity_that_are_seen_are_not_lost(dim: int, dtype: torch.dtype, backend: str) -> None:
    args = Case("x", 2, 1, dim, 200, 2, theta=1e3).make(dtype)
    clean = context_attention(**args, backend=backend)
    assert isinstance(clean, Tensor)
    for name, value in (("k", float("nan")), ("v", float("nan")), ("k", float("inf"))):
        broken = {**args, name: args[name].clone()}
        slot = int((args["kv_pos"][0] == 199).nonzero()[0])  # the last query's own
        broken[name][0, 0, slot, 3] = value
        out = context_attention(**broken, backend=backend)
        assert isinstance(out, Tensor)
        assert out[0, :, 1].isnan().any(), (name, value)
    alone = {**args, "kv_pos": torch.where(args["kv_pos"] == 7, 7, -1), "k": torch.full_like(args["k"], float("nan"))}
    for x in context_attention(**alone, return_lse=True, backend=backend):
        assert x.isnan().all()


@each_level
def test_a_bias_of_minus_infinity_for_all(backend: str) -> None:
    args = Case("x", 2, 1, 8, 100, 1).make(torch.float32)
    out, lse, mass = context_attention(**args, kv_bias=torch.full((1, 100), float("-inf")), **EXTRAS, backend=backend)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert (mass == 0).all()


def test_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    most = cpu_native.MOST_PORTABLE_QUERIES
    try:
        native.library().set_cpu_isa("scalar")
        assert cpu_native.serves(most)
        assert not cpu_native.serves(most + 1)
    finally:
        native.library().set_cpu_isa(None)
    if native.library().cpu_isa() != "scalar":
        assert cpu_native.serves(most + 1)
    monkeypatch.setattr(native, "available", lambda: "hidden by the test")
    assert not cpu_native.serves(1)


class Call:
    """A valid call of the library's own entry: B = 1, 4 query and 2 KV heads, 3 queries, 5 slots, 8 dimensions."""

    def __init__(self) -> None:
        self.q, self.k, self.v = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8)
        self.out, self.lse = torch.full_like(self.q, 7.0), torch.full((1, 4, 3), 7.0)
        self.arrays = torch.arange(3), torch.arange(5), torch.ones(4, dtype=torch.float64), torch.zeros(1, 5)
        q_pos, kv_pos, freq, self.sigma = self.arrays
        self.args: dict[str, Any] = {n: list(native.view(getattr(self, n))) for n in ("q", "k", "v", "out")}
        self.args |= {"q_pos": q_pos.data_ptr(), "kv_pos": kv_pos.data_ptr(), "inv_freq": freq.data_ptr(), "half": 4}
        self.args |= {"interleaved": False, "attention_scaling": 1.0, "sigma": 0, "kv_bias": 0, "scale": 1.0}
        self.args |= {"lse": self.lse.data_ptr(), "mass": 0, "n_threads": 1}

    def view(self, name: str, part: int, value: Any) -> None:
        self.args[name][part] = value

    def run(self) -> None:
        native.library().context_attention(**{n: tuple(x) if isinstance(x, list) else x for n, x in self.args.items()})


REFUSED: dict[str, tuple[Callable[[Call], None], type[Exception], str]] = {
    "3-D": (lambda c: c.args.update(q=native.view(c.q[0])), ValueError, "q: expected 4 dimensions, got 3"),
    "dtype": (lambda c: c.view("v", 1, 1), TypeError, "v: expected dtype 0 as q, got 1"),
    "out dtype": (lambda c: c.view("out", 1, 2), TypeError, "out: expected dtype 0 as q, got 2"),
    "k shape": (lambda c: c.view("k", 2, (1, 2, 5, 7)), ValueError, "k: expected shape [1, *, *, 8]"),
    "v shape": (lambda c: c.view("v", 2, (1, 2, 4, 8)), ValueError, "v: expected shape [1, 2, 5, 8], got [1, 2, 4, 8]"),
    "out shape": (lambda c: c.view("out", 2, (1, 4, 2, 8)), ValueError, "out: expected shape [1, 4, 3, 8]"),
    "heads": (
        lambda c: (c.view("k", 2, (1, 3, 5, 8)), c.view("v", 2, (1, 3, 5, 8)), None)[-1], ValueError,
        "k: expected a number of heads that divides Hq = 4, got 3",
    ),
    "no heads": (
        lambda c: (c.view("k", 2, (1, 0, 5, 8)), c.view("v", 2, (1, 0, 5, 8)), None)[-1], ValueError,
        "k: expected a number of heads that divides Hq = 4, got 0",
    ),
    "last stride": (lambda c: c.view("k", 3, (80, 40, 8, 2)), ValueError, "k: expected a contiguous last dimension"),
    "out overlap": (lambda c: c.view("out", 3, (96, 24, 4, 1)), ValueError, "out: expected a view without overlap"),
    "out is q": (lambda c: c.view("out", 0, c.args["q"][0]), ValueError, "out: expected memory apart from q"),
    "no q_pos": (lambda c: c.args.update(q_pos=0), ValueError, "q_pos: expected an array [B, T], got NULL"),
    "no kv_pos": (lambda c: c.args.update(kv_pos=0), ValueError, "kv_pos: expected an array [B, S], got NULL"),
    "no lse": (lambda c: c.args.update(lse=0), ValueError, "lse: expected an array [B, Hq, T], got NULL"),
    "half": (lambda c: c.args.update(half=5), ValueError, "half: expected 0..4 (D/2), got 5"),
    "half alone": (lambda c: c.args.update(inv_freq=0), ValueError, "half: expected 0..0 without inv_freq, got 4"),
    "sigma alone": (
        lambda c: c.args.update(inv_freq=0, half=0, sigma=c.sigma.data_ptr()), ValueError,
        "sigma: expected NULL without inv_freq",
    ),
    "scale": (lambda c: c.args.update(scale=float("inf")), ValueError, "scale: expected a finite number"),
    "magnitude": (
        lambda c: c.args.update(attention_scaling=float("nan")), ValueError, "attention_scaling: expected a finite",
    ),
    "threads": (lambda c: c.args.update(n_threads=-1), ValueError, "n_threads: expected at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_library_refuses_before_it_writes(name: str) -> None:
    change, error, words = REFUSED[name]
    call = Call()
    change(call)
    with pytest.raises(error) as caught:
        call.run()
    assert words in str(caught.value)
    assert (call.out == 7).all()
    assert (call.lse == 7).all()


def test_the_base_call_is_accepted() -> None:
    call = Call()
    call.run()
    assert torch.equal(call.out, torch.ones_like(call.out))
