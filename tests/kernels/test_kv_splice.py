"""`kv_splice_` against a plain list, in every layout; what it must not read and must not write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splice_model import DTYPES, EACH_BACKEND, plain_turn, same_bits, splice_list, turn
from torch import Tensor

from mc_kernels import Edit, PageTable, RopeSpec, SplicePlan, kv_splice_
from mc_kernels.kv_splice.cases import CASES, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, poisoned_empty

pytestmark = EACH_BACKEND
R, H, S, D = 4, 2, 23, 8
EDITS = [Edit(2, 4, 1), Edit(8, 1, 6), Edit(10, 0, 2), Edit(12, 5, 1)]  # shifts -3, +2, +4, 0
LENGTH, M = 19, 10


def ids(case: Case) -> str:
    return case.name


def plan(discipline: str = "ordered", length: int = LENGTH, capacity: int = S, **kwargs: Any) -> SplicePlan:
    return SplicePlan.from_edits(length, EDITS, capacity=capacity, discipline=discipline, **kwargs)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(R, H, n, D, dtype=dtype, seed=i) for i, n in enumerate((S, S, M, M))]


def contents(old: Tensor, new: Tensor, p: SplicePlan) -> Tensor:
    """What a list says that the entries are, by rank: [..., new_length, D]."""
    pool = torch.cat((old[..., p.slots, :], new.view(*old.shape[:-2], -1, old.shape[-1])), dim=-2)
    edits = [Edit(*e) for e in p.edits.tolist()]
    order = splice_list(range(p.length), edits, range(p.length, p.length + p.n_insert))
    return pool[..., order, :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_cases(case: Case, dtype: torch.dtype, backend: str) -> None:
    args = case.make(dtype)
    k, v, p, rope = args["k"], args["v"], args["plan"], args["rope"]
    old_k, old_v = k.clone(), v.clone()
    with poisoned_empty():
        kv_splice_(**args, backend=backend)
    got_k, got_v = k[..., p.new_slots, :], v[..., p.new_slots, :]
    assert same_bits(got_v, contents(old_v, args["v_new"], p))
    assert same_bits(v[..., p.new_length :, :], old_v[..., p.new_length :, :])
    assert same_bits(k[..., p.new_length :, :], old_k[..., p.new_length :, :])
    want_k = contents(old_k, args["k_new"], p)
    if rope is None:
        assert same_bits(got_k, want_k)
        return
    origin = torch.arange(p.new_length)  # what a key still has to be turned by: its new position for an inserted one
    kept = p.rank_map >= 0
    origin[p.rank_map[kept]] -= torch.arange(p.length)[kept]
    oracle = turn(want_k, origin, rope.inv_freq)
    assert_within_error_rule(got_k, oracle, plain_turn(want_k, origin, rope))


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_holes_are_never_read(discipline: str, backend: str) -> None:
    """NaN in unused slots and in removed entries; what is padded in k_new is NaN too."""
    p, rope = plan(discipline), RopeSpec.from_theta(100.0, D)
    k, v, k_new, v_new = inputs()
    removed = p.slots[p.rank_map < 0]
    for x in (k, v):
        x[:, :, LENGTH:] = float("nan")
        x[:, :, removed] = float("nan")
    pad = torch.full((R, H, 3, D), float("nan"))
    short = SplicePlan.from_edits(LENGTH, [], capacity=S, discipline=discipline)
    kv_splice_(
        k, v, torch.cat((k_new, pad), 2), torch.cat((v_new, pad), 2), [p, short], rope, rows=[0] * R, backend=backend
    )
    assert k[:, :, : p.new_length].isfinite().all()
    assert v[:, :, : p.new_length].isfinite().all()
    longer = SplicePlan.from_edits(p.new_length, [Edit(3, 9, 1)], capacity=S, discipline=discipline)
    k[:, :, 3:12] = v[:, :, 3:12] = float("nan")
    kv_splice_(k, v, k_new[:, :, :1], v_new[:, :, :1], longer, rope, backend=backend)
    assert k[:, :, : longer.new_length].isfinite().all()
    assert v[:, :, : longer.new_length].isfinite().all()


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_guard_bytes(discipline: str, dtype: torch.dtype, gap: int, backend: str) -> None:
    p = plan(discipline)
    guarded = [Guarded(x, gap=gap) for x in inputs(dtype)]
    kv_splice_(*(g.view for g in guarded), p, RopeSpec.from_theta(100.0, D), backend=backend)
    want = inputs(dtype)
    kv_splice_(*want, p, RopeSpec.from_theta(100.0, D), backend="ref")
    for g, w in zip(guarded, want, strict=True):
        g.check()
        if backend == "ref":
            assert same_bits(g.view, w)
        else:
            torch.testing.assert_close(g.view, w)


def as_nhd(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


def test_layouts_give_the_same_bits(backend: str) -> None:
    """HND, NHD, a row's K and V side by side, layers apart from the batch: one result."""
    p, rope = plan(), RopeSpec.from_theta(100.0, D)
    want = inputs()
    kv_splice_(*want, p, rope, backend=backend)
    k, v, k_new, v_new = inputs()
    nhd = [as_nhd(k), as_nhd(v)]
    assert nhd[0].stride(-2) != k.stride(-2)
    kv_splice_(*nhd, as_nhd(k_new), as_nhd(v_new), p, rope, backend=backend)
    packed = torch.cat((k, v), -1)
    halves = [packed[..., :D], packed[..., D:]]
    kv_splice_(*halves, k_new, v_new, p, rope, backend=backend)
    cache = torch.stack((k.view(2, 2, H, S, D), v.view(2, 2, H, S, D)), dim=1)  # [L, 2, B, H, S, D]
    layered = [cache[:, 0], cache[:, 1]]
    kv_splice_(*layered, k_new, v_new, p, rope, backend=backend)
    for got in (nhd, halves, layered):
        assert same_bits(got[0].reshape(R, H, S, D), want[0])
        assert same_bits(got[1].reshape(R, H, S, D), want[1])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 7])
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_paged_is_contiguous(discipline: str, page_size: int, index_dtype: torch.dtype, backend: str) -> None:
    layers, batch = 2, 2
    per_row = -(-S // page_size)
    p, rope = plan(discipline), RopeSpec(torch.rand(R, D // 2))
    want = inputs()
    kv_splice_(*want, p, rope, backend=backend)
    ids_of = torch.randperm(per_row * batch + 3, generator=torch.Generator().manual_seed(7))
    table = ids_of[: per_row * batch].view(batch, per_row)
    k, v, k_new, v_new = inputs()
    pools = []
    for x in (k, v):
        padded = torch.full((layers, batch, H, per_row * page_size, D), -7.0)
        padded[:, :, :, :S] = x.view(layers, batch, H, S, D)
        pool = torch.full((layers, len(ids_of), page_size, H, D), -7.0).transpose(2, 3)  # NHD pages
        pool[:, table] = padded.unflatten(3, (per_row, page_size)).movedim(3, 2)
        pools.append(pool)
    pages = PageTable(table.to(index_dtype), page_size)
    kv_splice_(*pools, k_new, v_new, p, rope, pages=pages, backend=backend)
    for pool, w in zip(pools, want[:2], strict=True):
        got = pool[:, table].movedim(2, 3).flatten(3, 4)  # [L, B, H, slots, D]
        assert same_bits(got[:, :, :, :S].reshape(R, H, S, D), w)
        assert (got[:, :, :, S:] == -7).all()
        assert (pool[:, ids_of[per_row * batch :]] == -7).all()


def test_paged_without_layers_and_with_a_shared_prefix(backend: str) -> None:
    """[P, Hkv, page, D] is one layer; a page that nothing writes may serve both sequences."""
    p = SplicePlan.from_edits(10, [Edit(5, 2, 1)], capacity=12)
    pool = normal(8, H, 4, D)
    k, v = pool.clone(), pool.clone() * 2
    pages = PageTable(torch.tensor([[6, 1, 2], [6, 4, 5]]), 4)
    new = normal(2, H, 1, D, seed=5)
    kv_splice_(k, v, new, new, p, pages=pages, backend=backend)
    for b in range(2):
        before, after = (x[pages.table[b]].transpose(0, 1).flatten(1, 2) for x in (pool, k))
        assert same_bits(after[:, : p.new_length], contents(before, new[b], p))
    assert same_bits(k[[0, 3, 6, 7]], pool[[0, 3, 6, 7]])


def test_rows_with_different_plans(backend: str) -> None:
    rope = RopeSpec.from_theta(100.0, D)
    plans = [plan(), SplicePlan.from_edits(7, [Edit(7, 0, 3)], capacity=S), SplicePlan.from_edits(0, [], capacity=S)]
    k, v, k_new, v_new = inputs()
    k_new[1, :, 3:] = float("nan")
    want = [x.clone() for x in (k, v)]
    for row, p in ((0, plans[0]), (1, plans[1]), (3, plans[2])):
        new = [x[row : row + 1, :, : p.n_insert] for x in (k_new, v_new)]
        kv_splice_(want[0][row : row + 1], want[1][row : row + 1], *new, p, rope, backend=backend)
    kv_splice_(k, v, k_new, v_new, plans, rope, rows=torch.tensor([0, 1, -1, 2]), backend=backend)
    assert same_bits(k, want[0])
    assert same_bits(v, want[1])
    assert same_bits(k[2], inputs()[0][2])
    assert not same_bits(k[1], inputs()[0][1])


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_empty(discipline: str, backend: str) -> None:
    def run(length: int, edits: list[Edit], slots: int = 6, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        p = SplicePlan.from_edits(length, edits, capacity=slots, discipline=discipline)
        k, v = normal(rows, H, slots, D), normal(rows, H, slots, D, seed=1)
        new = normal(rows, H, p.n_insert, D, seed=2)
        kv_splice_(k, v, new, new.clone(), p, RopeSpec.from_theta(100.0, D), backend=backend)
        return k, v, new

    k, v, _ = run(5, [])
    assert same_bits(k, normal(2, H, 6, D))
    assert same_bits(v, normal(2, H, 6, D, seed=1))
    k, v, _ = run(5, [Edit(0, 5, 0)])
    assert same_bits(k, normal(2, H, 6, D))
    k, v, new = run(0, [Edit(0, 0, 4)])
    assert same_bits(v[:, :, :4], new)
    assert same_bits(v[:, :, 4:], normal(2, H, 6, D, seed=1)[:, :, 4:])
    run(0, [], slots=0)
    run(3, [Edit(1, 1, 1)], rows=0)
    k, v, new = run(6, [Edit(0, 6, 6)])
    assert same_bits(v, new)


def test_left_and_right_moves_in_one_plan(backend: str) -> None:
    p = plan()
    shifts = {d - s for s, d in p.moves.tolist()}
    assert shifts == {-3, 2, 4}
    assert set(p.moves[:, 0].tolist()) & set(p.moves[:, 1].tolist())  # sources and destinations overlap
    k, v, k_new, v_new = inputs()
    kv_splice_(k, v, k_new, v_new, p, backend=backend)
    assert same_bits(k[:, :, : p.new_length], contents(inputs()[0], k_new, p))
    assert same_bits(v[:, :, : p.new_length], contents(inputs()[1], v_new, p))


def test_counts_of_the_cases(backend: str) -> None:
    """A case by hand: bytes and FLOPs; slots cost what the edit costs, ordered what the tail costs."""
    del backend
    case = Case("by-hand", 2, 3, 8, 41, 1, "collapse", "ordered", True, span=4)
    moved, row = 41 - 20 - 4, 2 * 3 * 8
    assert case.bytes(torch.bfloat16) == 4 * row * 2 * (moved + 1)
    assert case.flops() == 3 * row * (moved + 1)
    assert case.cache_bytes(torch.bfloat16) == 2 * row * 44 * 2
    by_name = {c.name: c.bytes(torch.bfloat16) for c in CASES}
    assert by_name["Llama-3-8B/32k/slots/1-collapse"] == by_name["Llama-3-8B/2k/slots/1-collapse"]
    assert by_name["Llama-3-8B/32k/ordered/1-collapse"] > 10 * by_name["Llama-3-8B/2k/ordered/1-collapse"]
