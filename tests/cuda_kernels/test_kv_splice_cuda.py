"""`kv_splice_` in CUDA C++ against the oracle and a plain list: cases, drawn calls, rotations, plans of any size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_kernels import BackendError, Edit, PageTable, RopeSpec, SplicePlan, cuda_backend, kv_splice_
from mc_kernels.kv_splice import cuda
from mc_kernels.kv_splice.cases import SMALL, Case
from mc_kernels.kv_splice.op import pack_plans
from mc_kernels.rope import apply_rope
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from splice_model import (
    DTYPES,
    calls,
    check_fresh_rotation,
    contents,
    drawn_call,
    normal,
    origin_of,
    plain_turn,
    same_bits,
    seeded,
    turn,
)

R, H, S, D = 2, 2, 24, 16
EDITS = [Edit(2, 6, 1), Edit(9, 1, 4), Edit(13, 0, 2), Edit(15, 2, 1)]  # shifts -5, -2, 0, -1


def emulate(device: str, **how: int) -> None:
    """How emulated blocks run: small ones give short inputs several tiles."""
    if device == "cpu":
        cuda_backend.library().emulate(**{"seed": 0, "threads": 32, "blocks": 3, "fault": 0} | how)


@pytest.mark.parametrize(("case", "dtype"), [(c, DTYPES[i % 3]) for i, c in enumerate(SMALL)], ids=str)
@pytest.mark.parametrize("threads", [4, 32])
def test_cases(case: Case, dtype: torch.dtype, threads: int, device: str) -> None:
    emulate(device, threads=threads, seed=threads)
    args = case.make(dtype, device)
    k, v, p, rope = args["k"], args["v"], args["plan"], args["rope"]
    old_k, old_v = k.clone(), v.clone()
    with poisoned_empty():
        kv_splice_(**args, backend="cuda")
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    call=calls(), dtype=st.sampled_from(DTYPES), threads=st.sampled_from([3, 8, 32]), blocks=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_drawn_calls_against_the_oracle(
    call: dict[str, Any], dtype: torch.dtype, threads: int, blocks: int, seed: int, device: str
) -> None:
    """Every order of blocks and threads is drawn too; guard bytes, gaps, holes and padding are checked."""
    emulate(device, threads=threads, blocks=blocks, seed=seed)
    k, v = drawn_call(call, dtype, "cuda", device=device)
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


PER_LAYER = torch.stack([RopeSpec.from_theta(t, D).inv_freq for t in (1e2, 1e6)])
SPECS = {
    "plain": RopeSpec.from_theta(1e4, D),
    "interleaved": RopeSpec.from_theta(1e4, D, interleaved=True),
    "partial": RopeSpec.from_theta(1e4, 6),
    "partial-interleaved": RopeSpec.from_theta(1e4, 6, interleaved=True),
    "fp64": RopeSpec(RopeSpec.from_theta(5e5, D).inv_freq.double() * 1.01),
    "per-layer": RopeSpec(PER_LAYER),
    "per-layer-partial": RopeSpec(PER_LAYER[:, 1:4]),
    "yarn": RopeSpec(RopeSpec.from_theta(1e4, D).inv_freq, attention_scaling=1.25),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_equals_a_fresh_rotation(discipline: str, name: str, device: str) -> None:
    emulate(device, threads=8)
    p = SplicePlan.from_edits(20, EDITS, capacity=S, discipline=discipline)
    dtype = DTYPES[(len(name) + len(discipline)) % 3]
    check_fresh_rotation(p, SPECS[name], dtype, R, H, D, backend="cuda", device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_zero_delta_keeps_the_bits(discipline: str, dtype: torch.dtype, device: str) -> None:
    """Positions move with the entries: every bit pattern (NaN payloads, -0, subnormals) comes through."""
    emulate(device, threads=8)
    p = SplicePlan.from_edits(20, EDITS, capacity=S, discipline=discipline)
    old = torch.randint(-128, 128, (R, H, S, D * dtype.itemsize), dtype=torch.int8, generator=seeded(0)).view(dtype)
    positions = torch.arange(100, 120)
    kept = p.rank_map >= 0
    new_positions = torch.full((p.new_length,), 7)
    new_positions[p.new_slots[p.rank_map[kept]]] = positions[p.slots[kept]]
    new = normal(R, H, p.n_insert, D, dtype=dtype)
    k, v, k_new, v_new = (x.to(device, copy=True) for x in (old, old, new, new))
    kv_splice_(
        k, v, k_new, v_new, p, SPECS["yarn"], positions=positions.to(device), new_positions=new_positions,
        backend="cuda",
    )  # fmt: skip
    for x in (k, v):
        assert same_bits(x.cpu()[:, :, p.new_slots[p.rank_map[kept]]], old[:, :, p.slots[kept]])
    torch.testing.assert_close(k.cpu()[:, :, p.insert_slots], apply_rope(new, torch.tensor(7), SPECS["yarn"]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_positions_and_every_quadrant(dtype: torch.dtype, interleaved: bool, device: str) -> None:
    """Positions to 1e7, every delta its own, against fp64; reduced in fp32 the angle would be off by half a radian."""
    emulate(device)
    n, dim = 97, 48
    spec = RopeSpec(torch.linspace(1e-4, 3.0, dim // 2), interleaved)
    p = SplicePlan.from_edits(n, [Edit(0, 1, 0), Edit(9, 0, 1)], capacity=n)
    before, after = (torch.randint(0, 10**7, (n,), generator=seeded(i)) for i in range(2))
    k, new = normal(1, 1, n, dim, dtype=dtype), normal(1, 1, 1, dim, dtype=dtype, seed=1)
    outs = []
    for name, x in (("cuda", k.to(device, copy=True)), ("ref", k.clone()), ("ref", k.double())):
        fresh = new.to(x.device, x.dtype)
        kv_splice_(x, x.clone(), fresh, fresh.clone(), p, spec, positions=before, new_positions=after, backend=name)
        outs.append(x.cpu())
    assert_within_error_rule(outs[0], outs[2], outs[1])


def flat_call(device: str, edits: int) -> tuple[list[Tensor], list[Any], SplicePlan]:
    """Arguments of the implementation: a plan of `edits` edits, on a cache of 16 bytes an entry."""
    length = 8 * edits + 8
    p = SplicePlan.from_edits(length, [Edit(8 * i + 1, 2 + i % 2, 2 - i % 2) for i in range(edits)], capacity=length)
    packed = pack_plans([p])
    tensors = [normal(1, 1, 1, length, 8, dtype=torch.float16, seed=i).to(device) for i in range(2)]
    tensors += [normal(1, 1, p.n_insert, 8, dtype=torch.float16, seed=i).to(device) for i in (2, 3)]
    rest = [
        None, None, True, packed.segments, packed.stays, packed.insert_slots, packed.offsets, None, None, None, False,
        1.0,
    ]  # fmt: skip
    return tensors, rest, p


def test_a_plan_of_many_edits_takes_a_workspace(device: str) -> None:
    emulate(device)
    assert cuda.kv_splice_workspace(*flat_call(device, 20)[0], *flat_call(device, 20)[1]) == 0
    tensors, rest, p = flat_call(device, 300)
    needed = cuda.kv_splice_workspace(*tensors, *rest)
    assert needed > 4 * 896
    old = [x.clone() for x in tensors]
    guarded = Guarded(torch.zeros(needed, dtype=torch.uint8))
    given = guarded.view if device == "cpu" else torch.zeros(needed, dtype=torch.uint8, device=device)
    for workspace in (None, given):
        for x, y in zip(tensors, old, strict=True):
            x.copy_(y)
        cuda.kv_splice_cuda(*tensors, *rest, workspace=workspace)
        for x, before, new in ((tensors[0], old[0], old[2]), (tensors[1], old[1], old[3])):
            assert same_bits(x[0, ..., : p.new_length, :], contents(before[0], new, p))
    guarded.check()
    before = tensors[0].clone()
    for bad in (given[:-8], torch.zeros(needed + 16, dtype=torch.uint8, device=device)[8:]):
        with pytest.raises(ValueError, match=f"workspace: expected {needed} bytes on a multiple of 16, got"):
            cuda.kv_splice_cuda(*tensors, *rest, workspace=bad)
    with pytest.raises(ValueError, match="workspace: expected contiguous uint8"):
        cuda.kv_splice_cuda(*tensors, *rest, workspace=given.view(torch.int8))
    assert same_bits(tensors[0], before)


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_empty(discipline: str, device: str) -> None:
    emulate(device)

    def run(length: int, edits: list[Edit], slots: int = 6, rows: int = 2) -> Tensor:
        p = SplicePlan.from_edits(length, edits, capacity=slots, discipline=discipline)
        k, v = (normal(rows, H, slots, D, seed=i).to(device) for i in range(2))
        new = normal(rows, H, p.n_insert, D, seed=2).to(device)
        kv_splice_(k, v, new, new.clone(), p, RopeSpec.from_theta(100.0, D), backend="cuda")
        return v.cpu()

    untouched = normal(2, H, 6, D, seed=1)
    assert same_bits(run(5, []), untouched)
    assert same_bits(run(5, [Edit(0, 5, 0)]), untouched)
    assert run(0, [], slots=0).numel() == 0
    assert run(3, [Edit(0, 1, 1)], rows=0).numel() == 0


def test_pages_of_int32_ids(device: str) -> None:
    emulate(device, threads=8)
    p = SplicePlan.from_edits(20, EDITS, capacity=S)
    flat = normal(1, H, S, D)
    table = torch.tensor([[5, 0, 3]], dtype=torch.int32)
    pool = torch.full((7, H, 8, D), float("nan"))
    pool[table[0].long()] = flat[0].unflatten(1, (3, 8)).movedim(1, 0)
    new = normal(1, H, p.n_insert, D, seed=2).to(device)
    k, v = pool.to(device), pool.to(device, copy=True)
    kv_splice_(k, v, new, new.clone(), p, pages=PageTable(table.to(device), 8), backend="cuda")
    got = v.cpu()[table[0].long()].movedim(0, 1).flatten(1, 2)
    assert same_bits(got[:, : p.new_length], contents(flat, new.cpu(), p)[0])
    assert v.cpu()[[1, 2, 4, 6]].isnan().all()


@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (8, 16), (11, 16), (9, 5)])
@pytest.mark.parametrize("paged", [False, True])
def test_slots_of_any_number_of_heads(heads: int, dim: int, paged: bool, device: str) -> None:
    """A thread has up to eight heads of an entry; entries move and come in, no key turns."""
    emulate(device, threads=16)
    p = SplicePlan.from_edits(40, [Edit(3, 6, 1), Edit(20, 2, 3), Edit(30, 5, 2)], capacity=48, discipline="slots")
    assert p.moves.shape[0]
    assert p.n_insert
    k, v = (normal(2, heads, 48, dim, seed=i).bfloat16().to(device) for i in range(2))
    fresh = [normal(2, heads, p.n_insert, dim, seed=i).bfloat16().to(device) for i in (2, 3)]
    wants = [contents(x.cpu(), y.cpu(), p) for x, y in zip((k, v), fresh, strict=True)]
    if paged:
        order = torch.tensor([4, 1, 5, 0, 2, 3], device=device)
        paged_k, paged_v = (x.unflatten(2, (6, 8)).transpose(1, 2)[:, order.argsort()].contiguous() for x in (k, v))
        kv_splice_(paged_k, paged_v, *fresh, p, pages=PageTable(order[None], 8), backend="cuda")
        k, v = (x[:, order].transpose(1, 2).flatten(2, 3) for x in (paged_k, paged_v))
    else:
        kv_splice_(k, v, *fresh, p, backend="cuda")
    slots = p.new_slots.to(device)
    for x, want in zip((k, v), wants, strict=True):
        assert same_bits(x[:, :, slots].cpu(), want)


def test_refusals(device: str) -> None:
    x = torch.zeros(1, 1, 4, 2, dtype=torch.float64, device=device)
    new = x[:, :, :0]
    args = (x, x.clone(), new.clone(), new.clone(), SplicePlan.from_edits(4, [Edit(0, 1, 0)], capacity=4))
    with pytest.raises(BackendError, match="backend 'cuda' cannot serve: fp64 is for the oracle"):
        kv_splice_(*args, backend="cuda")


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_opcheck(discipline: str, device: str) -> None:
    emulate(device)
    tensors, rest, _ = flat_call(device, 4)
    torch.library.opcheck(torch.ops.mc.kv_splice_.default, (*tensors, *rest, "cuda"))


@pytest.mark.gpu
def test_a_graph_replays_the_splice() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors, rest, p = flat_call("cuda", 20)
    old = [x.clone() for x in tensors]
    workspace = torch.empty(16, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def allocations() -> int:  # those given back again too
        return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))

    with torch.cuda.graph(graph):
        # Within: the first capture of a process takes two numbers for the generator's state (1 KiB) where it begins.
        before = allocations()
        cuda.kv_splice_cuda(*tensors, *rest, workspace=workspace)
        assert allocations() == before
    assert same_bits(tensors[1].cpu(), old[1].cpu())
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(tensors[1][0, ..., : p.new_length, :].cpu(), contents(old[1][0].cpu(), old[3].cpu(), p))


@pytest.mark.gpu
def test_a_graph_replays_the_op_with_positions_and_pages_on_the_device() -> None:
    """Their values are checked outside of a capture, and not read within."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    p = SplicePlan.from_edits(40, [Edit(3, 4, 1), Edit(20, 2, 3)], capacity=48)
    k, v = (normal(1, 2, 48, 16, seed=i).cuda() for i in range(2))
    paged = [x.view(1, 2, 6, 8, 16).transpose(1, 2).contiguous() for x in (k, v)]  # [L, P, Hkv, page, D]
    fresh = [normal(1, 2, p.n_insert, 16, seed=i).cuda() for i in (2, 3)]
    rope = RopeSpec.from_theta(1e4, 16)
    at = {"positions": torch.arange(p.length).cuda() * 2, "new_positions": torch.arange(p.new_length).cuda() * 3}
    pages = PageTable(torch.arange(6, device="cuda")[None], 8)
    wants = [x.clone() for x in paged]
    kv_splice_(*wants, *fresh, p, rope, **at, pages=pages, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_splice_(*paged, *fresh, p, rope, **at, pages=pages, backend="cuda")
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(x.cpu(), y.cpu()) for x, y in zip(paged, wants, strict=True))
