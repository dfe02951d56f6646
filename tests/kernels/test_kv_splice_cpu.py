"""`kv_splice_` in C++ at every instruction set level: drawn calls against the oracle, roundings, addresses, threads."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splice_model import BACKENDS, DTYPES, calls, drawn_call, normal, same_bits, seeded
from torch import Tensor

from mc_kernels import BackendError, Edit, RopeSpec, SplicePlan, kv_splice_, native
from mc_kernels.kv_splice import cpu
from mc_kernels.kv_splice.cases import Case
from mc_kernels.testing import assert_within_error_rule, max_error

LEVELS = [name for name in BACKENDS if name != "ref"]
pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
HALVES = (torch.bfloat16, torch.float16)


@each_level
@settings(max_examples=120, deadline=None)
@given(call=calls(), dtype=st.sampled_from(DTYPES))
def test_drawn_calls_against_the_oracle(backend: str, call: dict[str, Any], dtype: torch.dtype) -> None:
    k, v = drawn_call(call, dtype, backend)
    ref_k, ref_v = drawn_call(call, dtype, "ref")
    assert same_bits(v, ref_v)
    assert torch.equal(k.isnan(), ref_k.isnan())
    if call["rope"] is None:
        assert same_bits(k, ref_k)
        return
    exact, _ = drawn_call(call, dtype, "ref", in_dtype=torch.float64)
    # The error rule with two roundings: of a few numbers the oracle may hit all by luck.
    scale = float(exact.nan_to_num(0.0).abs().max()) if exact.numel() else 0.0
    assert max_error(k, exact) <= 2 * max_error(ref_k, exact) + 2 * torch.finfo(dtype).eps * scale


def one_band(inv_freq: float) -> RopeSpec:
    return RopeSpec(torch.tensor([inv_freq]))


def every_pattern(dtype: torch.dtype) -> Tensor:
    """[1, 1, 65536, 2]: each bit pattern, paired with zero."""
    x = torch.zeros(65_536, 2, dtype=dtype)
    x[:, 0] = torch.arange(-32_768, 32_768).to(torch.int16).view(dtype)
    return x[None, None]


@each_level
@pytest.mark.parametrize("scaling", [1.0, 1 / 3, 1.7, 2.0**-8])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_rounded_to_nearest_even(backend: str, dtype: torch.dtype, scaling: float) -> None:
    """All 65,536 values, scaled (rotated by nothing: frequency 0): subnormals, halves, overflow, infinities, NaN."""
    new = every_pattern(dtype)
    n = new.shape[2]
    k, v = torch.zeros_like(new), torch.zeros_like(new)
    spec = RopeSpec(torch.zeros(1), attention_scaling=scaling)
    kv_splice_(k, v, new, new.clone(), SplicePlan.from_edits(0, [Edit(0, 0, n)], capacity=n), spec, backend=backend)
    want = (new[..., 0].float() * scaling).to(dtype)
    got = k[..., 0]
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert same_bits(got[number], want[number])
    assert same_bits(v, new)


@each_level
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_phases_and_every_quadrant(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    """Positions all around the circle and far out, every delta its own; against fp64."""
    n, dim = 517, 34
    spec = RopeSpec(torch.linspace(1e-4, 3.0, dim // 2), interleaved)
    p = SplicePlan.from_edits(n, [Edit(0, 1, 0)], capacity=n)
    before = torch.randint(0, 10**7, (n,), generator=seeded(0))
    after = torch.randint(0, 10**7, (n - 1,), generator=seeded(1))
    k, new = normal(1, 1, n, dim, dtype=dtype), torch.zeros(1, 1, 0, dim, dtype=dtype)
    outs = []
    for name, x in ((backend, k.clone()), ("ref", k.clone()), ("ref", k.double())):
        fresh = new.to(x.dtype)
        kv_splice_(x, x.clone(), fresh, fresh, p, spec, positions=before, new_positions=after, backend=name)
        outs.append(x[:, :, : n - 1])
    assert_within_error_rule(outs[0], outs[2], outs[1])


@each_level
@pytest.mark.parametrize("off", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_of_any_alignment(backend: str, dtype: torch.dtype, off: int) -> None:
    """Torch does not make tensors at odd addresses, other callers may: through the library's own entry."""
    p = SplicePlan.from_edits(19, [Edit(2, 4, 1), Edit(9, 1, 5)], capacity=20)
    rope = RopeSpec.from_theta(1e3, 20)
    given_ = [normal(1, 1, 2, n, 22, dtype=dtype, seed=i) for i, n in enumerate((20, 20, p.n_insert, p.n_insert))]
    want = [x.clone() for x in given_]
    kv_splice_(*want[:2], want[2][0], want[3][0], p, rope, backend=backend)
    shape = [x.shape if i < 2 else x.shape[1:] for i, x in enumerate(given_)]
    raw = []
    for x in given_:
        buffer = torch.full((x.nbytes + 64,), 0xA5, dtype=torch.uint8)
        buffer[32 + off : 32 + off + x.nbytes] = x.flatten().view(torch.uint8)
        raw.append(buffer)
    views = [
        (b.data_ptr() + 32 + off, native.view(x)[1], tuple(s), x.stride()[-len(s) :])
        for b, x, s in zip(raw, given_, shape, strict=True)
    ]
    offsets = torch.tensor([[0] * 5, [len(p.segments), len(p.stays), p.n_insert, p.length, p.new_length]])
    arrays = (p.segments, p.stays, p.insert_slots)
    freq = rope.inv_freq.double()
    native.library().kv_splice(
        *views, None, 1, offsets.data_ptr(), 0, *(x.data_ptr() for x in arrays), 0, 0, 1, freq.data_ptr(), len(freq),
        False, 1.0, 1,
    )  # fmt: skip
    for b, w in zip(raw, want, strict=True):
        assert torch.equal(b[32 + off : 32 + off + w.nbytes], w.flatten().view(torch.uint8))
        assert (b[: 32 + off] == 0xA5).all()
        assert (b[32 + off + w.nbytes :] == 0xA5).all()


@each_level
def test_strides_beyond_two_gigabytes(backend: str) -> None:
    """Slots 2.5 GB apart in memory that the system only hands out where it is touched."""
    far, slots, dim = 5 << 28, 3, 8
    space = mmap.mmap(-1, 4 * far * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(space, dtype=torch.bfloat16)
    k = flat.as_strided((1, 1, slots, dim), (dim, dim, far, 1), 0)
    v = flat.as_strided((1, 1, slots, dim), (dim, dim, far, 1), 64)
    old_k, old_v, new = normal(1, 1, slots, dim), normal(1, 1, slots, dim, seed=1), normal(1, 1, 1, dim, seed=2)
    k.copy_(old_k)
    v.copy_(old_v)
    small_k, small_v, new = k.clone(), v.clone(), new.bfloat16()
    p = SplicePlan.from_edits(slots, [Edit(0, 1, 0), Edit(2, 0, 1)], capacity=slots)
    for x, y in ((k, v), (small_k, small_v)):
        kv_splice_(x, y, new, new.clone(), p, one_band(0.3), backend=backend)
    assert same_bits(k, small_k)
    assert same_bits(v, small_v)


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Its traffic is several times what wakes a thread.
BIG = Case("big", 4, 3, 64, 2048, 8, "mixed", theta=1e5)


@each_level
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_any_number_of_threads_gives_the_same_bits(backend: str, count: int, layout: str, threads: Any) -> None:
    """More threads than rows too: heads that lie side by side are then taken apart."""
    assert BIG.bytes(torch.bfloat16) > 2 * BIG.rows * 2**19
    args, want = BIG.make(torch.bfloat16), BIG.make(torch.bfloat16)
    if layout == "NHD":
        args |= {name: args[name].transpose(-2, -3).contiguous().transpose(-2, -3) for name in ("k", "v")}
    threads(1)
    kv_splice_(**want, backend=backend)
    threads(count)
    kv_splice_(**args, backend=backend)
    for name in ("k", "v"):
        assert same_bits(args[name], want[name])


@each_level
def test_several_python_threads_at_once(backend: str, threads: Any) -> None:
    """Each on its own cache, all asking for the pool: one gets it, the others work alone; nobody waits or errs."""
    threads(3)
    want = BIG.make(torch.float32)
    for _ in range(6):
        kv_splice_(**want, backend=backend)
    caches = [BIG.make(torch.float32) for _ in range(5)]

    def work(args: dict[str, Any]) -> None:
        torch.set_num_threads(3)
        for _ in range(6):
            kv_splice_(**args, backend=backend)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, caches))
    for args in caches:
        assert same_bits(args["k"], want["k"])
        assert same_bits(args["v"], want["v"])


def test_the_default_backend_is_the_native_one(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    library = native.library()

    class Spy:
        @staticmethod
        def kv_splice(*args: Any) -> None:
            served.append(args)
            library.kv_splice(*args)

    monkeypatch.delenv("MC_BACKEND", raising=False)
    monkeypatch.setattr(cpu.native, "library", lambda: Spy)
    args = BIG.make(torch.float32)
    kv_splice_(**args)
    assert len(served) == 1
    kv_splice_(**args, backend="ref")
    assert len(served) == 1


def test_fp64_is_for_the_oracle() -> None:
    x = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    args = (x, x.clone(), x[:, :, :0].clone(), x[:, :, :0].clone(), SplicePlan.from_edits(4, [], capacity=4))
    kv_splice_(*args)
    with pytest.raises(BackendError, match="backend 'cpu' cannot serve: fp64 is for the oracle"):
        kv_splice_(*args, backend="cpu")
