"""`kv_splice_` in Triton against the oracle and a plain list; races; what it allocates and how often it launches."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_kernels import BackendError, Edit, RopeSpec, SplicePlan, kv_splice_
from mc_kernels.kv_splice import triton_kernel
from mc_kernels.kv_splice.cases import SMALL, Case
from mc_kernels.kv_splice.op import pack_plans
from mc_kernels.rope import apply_rope
from mc_kernels.testing import assert_within_error_rule, max_error, poisoned_empty

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from allocations import NoAllocation
from race_trace import RaceTrace
from splice_model import (
    DTYPES,
    calls,
    check_fresh_rotation,
    contents,
    drawn_call,
    llama3,
    normal,
    origin_of,
    plain_turn,
    same_bits,
    seeded,
    turn,
)

R, H, S, D = 2, 2, 24, 16
EDITS = [Edit(2, 6, 1), Edit(9, 1, 4), Edit(13, 0, 2), Edit(15, 2, 1)]  # shifts -5, -2, 0, -1
MIXED = [Edit(0, 3, 1), Edit(9, 1, 5), Edit(19, 1, 1)]  # shifts -2 and +2
# Shifts -6 and +6: segments of several tiles of 4 that overlap their destinations by more than the tile loaded ahead.
FAR = [Edit(0, 7, 1), Edit(20, 1, 13), Edit(39, 1, 1)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 entries and 8 columns, so that a short segment has several and columns are shared out."""
    chosen = triton_kernel.choose_tiles

    def choose(*args: Any) -> triton_kernel.Tiles:
        tiles = chosen(*args)
        return tiles._replace(
            turn_entries=4, copy_entries=4, bands=min(tiles.bands, 4), columns=min(tiles.columns, 8), warps=4
        )

    monkeypatch.setattr(triton_kernel, "choose_tiles", choose)


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(-128, 128, size, dtype=torch.int8, generator=seeded(0)).view(dtype)


@pytest.mark.parametrize(("case", "dtype"), [(c, DTYPES[i % 3]) for i, c in enumerate(SMALL)], ids=str)
def test_cases(case: Case, dtype: torch.dtype, device: str, small_tiles: None) -> None:
    args = case.make(dtype, device)
    k, v, p, rope = args["k"], args["v"], args["plan"], args["rope"]
    old_k, old_v = k.clone(), v.clone()
    with poisoned_empty():
        kv_splice_(**args, backend="triton")
    slots = p.new_slots.to(device)
    assert same_bits(v[..., slots, :], contents(old_v, args["v_new"], p))
    for x, old in ((k, old_k), (v, old_v)):
        assert same_bits(x[..., p.new_length :, :], old[..., p.new_length :, :])
    want_k = contents(old_k, args["k_new"], p)
    if rope is None:
        assert same_bits(k[..., slots, :], want_k)
        return
    got, want = k[..., slots, :].cpu(), want_k.cpu()
    assert_within_error_rule(got, turn(want, origin_of(p), rope.inv_freq), plain_turn(want, origin_of(p), rope))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls(), dtype=st.sampled_from(DTYPES), backwards=st.booleans())
def test_drawn_calls_against_the_oracle(
    call: dict[str, Any], dtype: torch.dtype, backwards: bool, device: str, small_tiles: None
) -> None:
    """Also with the programs in reverse order, and without a race in any."""
    with pytest.MonkeyPatch.context() as patch:
        trace = None
        if device == "cpu":
            spliced = triton_kernel.kv_splice_triton

            def splice(k: Tensor, v: Tensor, *rest: Any) -> None:
                nonlocal trace
                trace = RaceTrace(patch, [k, v], backwards=backwards)
                spliced(k, v, *rest)

            patch.setattr(triton_kernel, "kv_splice_triton", splice)
        k, v = drawn_call(call, dtype, "triton", device=device)
    if trace is not None:
        trace.check()
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


@pytest.mark.parametrize("rope", [None, RopeSpec.from_theta(1e4, D)], ids=["plain", "rope"])
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_no_race(
    discipline: str, rope: RopeSpec | None, device: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left and right moves that overlap, of several tiles, and an insertion into slots that are sources."""
    if device != "cpu":
        pytest.skip("the trace is of the interpreter")
    edits = FAR if discipline == "ordered" else [Edit(0, 7, 1), Edit(20, 9, 3)]
    p = SplicePlan.from_edits(40, edits, capacity=48, discipline=discipline)
    if discipline == "ordered":
        shifts = {d - s for s, d in p.moves.tolist()}
        assert min(shifts) < 0 < max(shifts)
        assert set(p.moves[:, 0].tolist()) & set(p.insert_slots.tolist())
    k, v, k_new, v_new = (normal(R, H, n, D, seed=i) for i, n in enumerate((48, 48, p.n_insert, p.n_insert)))
    old_v = v.clone()
    trace = RaceTrace(monkeypatch, [k, v])
    kv_splice_(k, v, k_new, v_new, p, rope, backend="triton")
    trace.check()
    assert len(trace.programs) > 2 * R
    assert same_bits(v[:, :, p.new_slots], contents(old_v, v_new, p))


PER_LAYER = torch.stack([RopeSpec.from_theta(t, D).inv_freq for t in (1e2, 1e6)])
SPECS = {
    "plain": RopeSpec.from_theta(1e4, D),
    "interleaved": RopeSpec.from_theta(1e4, D, interleaved=True),
    "partial": RopeSpec.from_theta(1e4, 6),
    "partial-interleaved": RopeSpec.from_theta(1e4, 6, interleaved=True),
    "llama3-fp64": RopeSpec(llama3(5e5, D)),
    "per-layer": RopeSpec(PER_LAYER),
    "per-layer-partial": RopeSpec(PER_LAYER[:, 1:4]),
    "yarn": RopeSpec(llama3(1e4, D).float(), attention_scaling=1.25),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_equals_a_fresh_rotation(discipline: str, name: str, device: str, small_tiles: None) -> None:
    p = SplicePlan.from_edits(20, EDITS, capacity=S, discipline=discipline)
    dtype = DTYPES[(len(name) + len(discipline)) % 3]
    check_fresh_rotation(p, SPECS[name], dtype, R, H, D, backend="triton", device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_zero_delta_keeps_the_bits(discipline: str, dtype: torch.dtype, device: str, small_tiles: None) -> None:
    """Positions move with the entries: every bit pattern (NaN payloads, -0, subnormals) comes through."""
    p = SplicePlan.from_edits(20, MIXED if discipline == "ordered" else EDITS, capacity=S, discipline=discipline)
    old = random_bits(dtype, R, H, S, D)
    positions = torch.arange(100, 120)
    kept = p.rank_map >= 0
    new_positions = torch.full((p.new_length,), 7)
    new_positions[p.new_slots[p.rank_map[kept]]] = positions[p.slots[kept]]
    new = normal(R, H, p.n_insert, D, dtype=dtype)
    k, v, k_new, v_new = (x.to(device, copy=True) for x in (old, old, new, new))
    # Positions on the cache's device are read where they are.
    kv_splice_(
        k, v, k_new, v_new, p, SPECS["yarn"], positions=positions.to(device), new_positions=new_positions,
        backend="triton",
    )  # fmt: skip
    for x in (k, v):
        assert same_bits(x.cpu()[:, :, p.new_slots[p.rank_map[kept]]], old[:, :, p.slots[kept]])
    torch.testing.assert_close(k.cpu()[:, :, p.insert_slots], apply_rope(new, torch.tensor(7), SPECS["yarn"]))


def test_packed_positions_leave_the_head_of_the_cache(device: str) -> None:
    old = random_bits(torch.float32, R, H, S, D)
    p, new = SplicePlan.from_edits(20, [Edit(4, 8, 1)], capacity=S), normal(R, H, 1, D)
    k, v, k_new, v_new = (x.to(device, copy=True) for x in (old, old, new, new))
    kv_splice_(k, v, k_new, v_new, p, SPECS["plain"], backend="triton")
    for x in (k, v):
        assert same_bits(x.cpu()[:, :, :4], old[:, :, :4])
        assert same_bits(x.cpu()[:, :, 13:], old[:, :, 13:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_positions_and_every_quadrant(dtype: torch.dtype, interleaved: bool, device: str) -> None:
    """Positions to 1e7, every delta its own, against fp64; reduced in fp32 the angle would be off by half a radian."""
    n, dim = 197, 34
    spec = RopeSpec(torch.linspace(1e-4, 3.0, dim // 2), interleaved)
    p = SplicePlan.from_edits(n, [Edit(0, 1, 0), Edit(9, 0, 1)], capacity=n)
    before, after = (torch.randint(0, 10**7, (n,), generator=seeded(i)) for i in range(2))
    k, new = normal(1, 1, n, dim, dtype=dtype), normal(1, 1, 1, dim, dtype=dtype, seed=1)
    outs = []
    for name, x in (("triton", k.to(device, copy=True)), ("ref", k.clone()), ("ref", k.double())):
        fresh = new.to(x.device, x.dtype)
        kv_splice_(x, x.clone(), fresh, fresh.clone(), p, spec, positions=before, new_positions=after, backend=name)
        outs.append(x.cpu())
    assert_within_error_rule(outs[0], outs[2], outs[1])


@pytest.mark.parametrize("scaling", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_is_rounded_to_nearest_even(scaling: float, dtype: torch.dtype, device: str) -> None:
    """All 65,536 values, scaled (rotated by nothing: frequency 0): subnormals, halves, overflow, infinities, NaN."""
    if device == "cpu" and dtype == torch.bfloat16 and scaling != 1:
        pytest.skip("the interpreter truncates to bf16")
    new = torch.zeros(1, 1, 65_536, 2, dtype=dtype)
    new[..., 0] = torch.arange(-32_768, 32_768).to(torch.int16).view(dtype)
    n = new.shape[2]
    k, v, k_new, v_new = (x.to(device, copy=True) for x in (torch.zeros_like(new), torch.zeros_like(new), new, new))
    spec = RopeSpec(torch.zeros(1), attention_scaling=scaling)
    p = SplicePlan.from_edits(0, [Edit(0, 0, n)], capacity=n, discipline="slots")
    kv_splice_(k, v, k_new, v_new, p, spec, backend="triton")
    want, got = (new[..., 0].float() * scaling).to(dtype), k.cpu()[..., 0]
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    if device == "cpu" and dtype == torch.bfloat16:
        number &= (want == 0) | (want.abs() > torch.finfo(dtype).tiny)  # the interpreter flushes subnormals
    assert same_bits(got[number], want[number])
    assert same_bits(v.cpu(), new)


def test_many_splices_do_not_drift(device: str) -> None:
    """Unrotated slots: the survivors' bits are those of the start. Rotated: at most a rounding a splice."""
    raw = normal(1, 1, 12, 8)
    spec = RopeSpec.from_theta(1e4, 8)
    k, v = apply_rope(raw, torch.arange(12), spec).to(device), raw.to(device, copy=True)
    slot_k, slot_v = raw.to(device, copy=True), raw.to(device, copy=True)
    slots: Tensor | None = None
    length = 12
    for i in range(24):
        edit = Edit(2, 4, 1) if i % 2 == 0 else Edit(2, 1, 4)
        new = raw[:, :, 2 : 2 + edit.insert].to(device)
        kv_splice_(k, v, new, new, SplicePlan.from_edits(length, [edit], capacity=12), spec, backend="triton")
        p = SplicePlan.from_edits(length, [edit], capacity=12, discipline="slots", slots=slots)
        kv_splice_(slot_k, slot_v, new, new, p, backend="triton")
        slots, length = p.new_slots, p.new_length
    assert slots is not None
    assert slots.tolist() != list(range(12))
    for x in (slot_k, slot_v):
        assert same_bits(x.cpu()[:, :, slots], raw)
    assert same_bits(v.cpu(), raw)
    exact = turn(raw, torch.arange(12), spec.inv_freq)
    drift = max_error(k.cpu(), exact) / float(exact.abs().max())
    assert 0 < drift < 24 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_empty(discipline: str, device: str) -> None:
    def run(length: int, edits: list[Edit], slots: int = 6, rows: int = 2) -> tuple[Tensor, Tensor]:
        p = SplicePlan.from_edits(length, edits, capacity=slots, discipline=discipline)
        k, v = (normal(rows, H, slots, D, seed=i).to(device) for i in range(2))
        new = normal(rows, H, p.n_insert, D, seed=2).to(device)
        kv_splice_(k, v, new, new.clone(), p, RopeSpec.from_theta(100.0, D), backend="triton")
        return v.cpu(), new.cpu()

    untouched = normal(2, H, 6, D, seed=1)
    assert same_bits(run(5, [])[0], untouched)
    assert same_bits(run(5, [Edit(0, 5, 0)])[0], untouched)
    v, new = run(0, [Edit(0, 0, 4)])
    assert same_bits(v[:, :, :4], new)
    assert same_bits(v[:, :, 4:], untouched[:, :, 4:])
    run(0, [], slots=0)
    run(3, [Edit(1, 1, 1)], rows=0)
    v, new = run(6, [Edit(0, 6, 6)])
    assert same_bits(v, new)


def test_strides_beyond_two_gigabytes(device: str) -> None:
    """Slots 2.5 GB apart in memory that the system only hands out where it is touched."""
    if device != "cpu":
        pytest.skip("takes ten gigabytes of a GPU's memory")
    far, slots, dim = 5 << 28, 3, 8
    space = mmap.mmap(-1, 4 * far * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(space, dtype=torch.bfloat16)
    old_k, old_v, new = (normal(1, 1, n, dim, dtype=torch.bfloat16, seed=n) for n in (slots, slots, 1))
    spec = RopeSpec(torch.tensor([0.3]))
    for discipline in ("ordered", "slots"):
        k, v = (flat.as_strided((1, 1, slots, dim), (dim, dim, far, 1), start) for start in (0, 64))
        k.copy_(old_k)
        v.copy_(old_v)
        small_k, small_v = old_k.clone(), old_v.clone()
        p = SplicePlan.from_edits(slots, [Edit(0, 1, 0), Edit(2, 0, 1)], capacity=slots, discipline=discipline)
        for x, y in ((k, v), (small_k, small_v)):
            kv_splice_(x, y, new, new.clone(), p, spec, backend="triton")
        assert same_bits(k, small_k)
        assert same_bits(v, small_v)


def flat_arguments(device: str, discipline: str = "ordered", start: int = 2) -> tuple[list[Tensor], tuple[Any, ...]]:
    """k, v, k_new, v_new of a call on the raw op, and what follows them up to `backend`."""
    p = SplicePlan.from_edits(20, [Edit(start, 5, 1)], capacity=S, discipline=discipline)
    shapes = ((1, R, H, S, D), (1, R, H, S, D), (R, H, 1, D), (R, H, 1, D))
    tensors = [normal(*shape, seed=i).to(device) for i, shape in enumerate(shapes)]
    inv_freq = RopeSpec.from_theta(1e4, D).inv_freq.to(device)
    positions = () if discipline == "ordered" else (torch.arange(20), torch.arange(16))
    before, after = positions or (None, None)
    return tensors, (None, None, discipline == "ordered", *pack_plans([p]), before, after, inv_freq, False, 1.0)


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_a_workspace_serves_every_allocation(discipline: str, device: str) -> None:
    tensors, rest = flat_arguments(device, discipline)
    want = [x.clone() for x in tensors]
    triton_kernel.kv_splice_triton(*want, *rest)
    size = triton_kernel.kv_splice_workspace(*rest[1:10])
    workspace = torch.full((size + 3,), -7, dtype=torch.int64, device=device)
    staging = torch.full((size + 3,), -7, dtype=torch.int64, pin_memory=device == "cuda")

    with NoAllocation():
        triton_kernel.kv_splice_triton(*tensors, *rest, workspace=workspace, staging=staging)
    for x, w in zip(tensors, want, strict=True):
        assert same_bits(x, w)
    assert (workspace[size:] == -7).all()
    assert (staging[size:] == -7).all()
    with pytest.raises(ValueError, match=f"workspace: expected at least {size} int64"):
        triton_kernel.kv_splice_triton(*tensors, *rest, workspace=workspace[: size - 1], staging=staging)
    with pytest.raises(ValueError, match=f"staging: expected at least {size} int64"):
        triton_kernel.kv_splice_triton(*tensors, *rest, workspace=workspace, staging=staging[: size - 1])


def test_a_graph_replays_another_plan(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs")
    tensors, rest = flat_arguments(device)
    size = triton_kernel.kv_splice_workspace(*rest[1:10])
    buffers = {
        "workspace": torch.empty(size, dtype=torch.int64, device=device),
        "staging": torch.empty(size, dtype=torch.int64, pin_memory=True),
    }
    triton_kernel.kv_splice_triton(*[x.clone() for x in tensors], *rest, **buffers)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_kernel.kv_splice_triton(*tensors, *rest, **buffers)
    _, other = flat_arguments(device, start=7)
    want = [x.clone() for x in tensors]
    triton_kernel.kv_splice_triton(*want, *other)
    torch.cuda.synchronize()
    words = triton_kernel._words(*other[1:10])
    buffers["staging"].copy_(torch.cat([torch.from_numpy(x) for x in words.arrays]))
    graph.replay()
    torch.cuda.synchronize()
    for x, w in zip(tensors, want, strict=True):
        assert same_bits(x, w)


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_one_launch(discipline: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    for name in ("splice_ordered", "splice_slots"):
        kernel = getattr(triton_kernel, name)

        class Counted:
            def __init__(self, kernel: Any = kernel) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: Any) -> Any:
                launches.append(grid)
                return self.kernel[grid]

        monkeypatch.setattr(triton_kernel, name, Counted())
    tensors, rest = flat_arguments(device, discipline)
    triton_kernel.kv_splice_triton(*tensors, *rest)
    assert len(launches) == 1


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_opcheck(discipline: str, device: str) -> None:
    tensors, rest = flat_arguments(device, discipline)
    torch.library.opcheck(torch.ops.mc.kv_splice_.default, (*tensors, *rest, "triton"))


def test_compiled(device: str) -> None:
    """Under fullgraph with every plan tensor an input: one graph serves another plan's values."""
    inv_freq = RopeSpec.from_theta(1e4, D).inv_freq.to(device)

    def step(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, *plan: Tensor) -> Tensor:
        torch.ops.mc.kv_splice_(
            k, v, k_new, v_new, None, None, True, *plan, None, None, inv_freq, False, 1.0, "triton"
        )  # fmt: skip
        return k * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for start in (2, 7):
        tensors, rest = flat_arguments(device, start=start)
        want = [x.clone() for x in tensors]
        triton_kernel.kv_splice_triton(*want, *rest)
        out = compiled(*tensors, *rest[3:7])
        for x, w in zip(tensors, want, strict=True):
            assert same_bits(x, w)
        assert torch.equal(out, tensors[0] * 2)


def test_refusals(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 4, 2, dtype=torch.float64, device=device)
    new = x[:, :, :0]
    args = (x, x.clone(), new.clone(), new.clone(), SplicePlan.from_edits(4, [Edit(0, 1, 0)], capacity=4))
    with pytest.raises(BackendError, match="backend 'triton' cannot serve: fp64 is for the oracle"):
        kv_splice_(*args, backend="triton")
    if device == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendError, match="backend 'triton' cannot serve: no CUDA device"):
            kv_splice_(*args, backend="triton")
    else:
        cpu = [a.float().cpu() for a in args[:4]]
        with pytest.raises(BackendError, match="backend 'triton' cannot serve: expected cuda tensors, got cpu"):
            kv_splice_(*cpu, args[4], backend="triton")
