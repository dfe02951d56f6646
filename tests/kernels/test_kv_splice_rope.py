"""Re-rotation in `kv_splice_`: what a rotated cache must and must not suffer."""

from __future__ import annotations

import pytest
import torch
from splice_model import DTYPES, EACH_BACKEND, check_fresh_rotation, llama3, normal, plain_turn, same_bits, turn
from torch import Tensor

from mc_kernels import Edit, RopeSpec, SplicePlan, kv_splice_
from mc_kernels.rope import apply_rope
from mc_kernels.testing import assert_within_error_rule, max_error

pytestmark = EACH_BACKEND
R, H, S, D = 3, 2, 24, 16
COLLAPSE = [Edit(4, 8, 1)]


SPECS = {
    "plain": RopeSpec.from_theta(1e4, D),
    "interleaved": RopeSpec.from_theta(1e4, D, interleaved=True),
    "partial": RopeSpec.from_theta(1e4, 6),
    "partial-interleaved": RopeSpec.from_theta(1e4, 6, interleaved=True),
    "llama3": RopeSpec(llama3(5e5, D).float()),
    "per-layer": RopeSpec(torch.stack([RopeSpec.from_theta(t, D).inv_freq for t in (1e2, 1e4, 1e6)])),
    "per-layer-partial": RopeSpec(torch.stack([RopeSpec.from_theta(t, 4).inv_freq for t in (1e2, 1e4, 1e6)])),
    "yarn": RopeSpec(llama3(1e4, D).float(), attention_scaling=1.25),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_equals_a_fresh_rotation(discipline: str, name: str, dtype: torch.dtype, backend: str) -> None:
    p = SplicePlan.from_edits(20, [Edit(2, 6, 1), Edit(11, 1, 4)], capacity=S, discipline=discipline)
    check_fresh_rotation(p, SPECS[name], dtype, R, H, D, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_zero_delta_keeps_the_bits(discipline: str, dtype: torch.dtype, backend: str) -> None:
    """Positions move with the entries: every bit pattern (NaN payloads, -0, subnormals) comes through."""
    edits = [Edit(4, 8, 1), Edit(14, 1, 3)]
    p = SplicePlan.from_edits(20, edits, capacity=S, discipline=discipline)
    k = torch.randint(-128, 128, (R, H, S, D * dtype.itemsize), dtype=torch.int8).view(dtype)
    v, old = k.clone(), k.clone()
    positions = torch.arange(100, 120)
    kept = p.rank_map >= 0
    new_positions = torch.full((p.new_length,), 7)
    new_positions[p.new_slots[p.rank_map[kept]]] = positions[p.slots[kept]]
    new = normal(R, H, 4, D, dtype=dtype)
    kv_splice_(
        k, v, new, new.clone(), p, SPECS["yarn"], positions=positions, new_positions=new_positions, backend=backend
    )
    assert same_bits(k[:, :, p.new_slots[p.rank_map[kept]]], old[:, :, p.slots[kept]])
    torch.testing.assert_close(k[:, :, p.insert_slots], apply_rope(new, torch.tensor(7), SPECS["yarn"]))


def test_default_positions_leave_the_head_of_the_cache(backend: str) -> None:
    k = torch.randint(-128, 128, (R, H, S, D * 4), dtype=torch.int8).view(torch.float32)
    v, old = k.clone(), k.clone()
    p, new = SplicePlan.from_edits(20, COLLAPSE, capacity=S), normal(R, H, 1, D)
    kv_splice_(k, v, new, new.clone(), p, SPECS["plain"], backend=backend)
    assert same_bits(k[:, :, :4], old[:, :, :4])
    assert same_bits(k[:, :, 13:], old[:, :, 13:])


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_survivors_that_stay_are_turned_too(discipline: str, backend: str) -> None:
    p = SplicePlan.from_edits(20, COLLAPSE, capacity=S, discipline=discipline)
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 500, (20,), generator=generator)
    new_positions = torch.randint(0, 500, (13,), generator=generator)
    k, new = normal(R, H, S, D), normal(R, H, 1, D, seed=2)
    v, old = k.clone(), k.clone()
    kv_splice_(
        k, v, new, new.clone(), p, SPECS["plain"], positions=positions, new_positions=new_positions, backend=backend
    )
    kept = p.rank_map >= 0
    source, destination = p.slots[kept], p.new_slots[p.rank_map[kept]]
    assert (source == destination).any()
    delta = new_positions[destination] - positions[source]
    oracle = turn(old[:, :, source], delta, SPECS["plain"].inv_freq)
    plain = plain_turn(old[:, :, source], delta, SPECS["plain"])
    assert_within_error_rule(k[:, :, destination], oracle, plain)
    assert same_bits(v[:, :, destination], old[:, :, source])


def test_magnitude_is_not_applied_twice(backend: str) -> None:
    """After 40 re-rotations a YaRN-scaled key still has its norm; 1.25**40 would be 7,500."""
    spec = SPECS["yarn"]
    k = apply_rope(normal(1, 1, 12, D), torch.arange(12), spec)
    v, norm = k.clone(), k[0, 0, -1].norm()
    for i in range(40):
        edit = [Edit(2, 4, 1)] if i % 2 == 0 else [Edit(2, 1, 4)]
        p = SplicePlan.from_edits(12 if i % 2 == 0 else 9, edit, capacity=12)
        new = normal(1, 1, p.n_insert, D, seed=i)
        kv_splice_(k, v, new, new.clone(), p, spec, backend=backend)
        fresh = k[0, 0, p.insert_slots].norm(dim=-1)
        torch.testing.assert_close(fresh, 1.25 * new[0, 0].norm(dim=-1))
    torch.testing.assert_close(k[0, 0, -1].norm(), norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_of_ten_million(dtype: torch.dtype, backend: str) -> None:
    """The angle is reduced in fp64. In fp32 it would be off by half a radian."""
    spec = SPECS["plain"]
    p = SplicePlan.from_edits(20, COLLAPSE, capacity=S)
    k, new = normal(R, H, S, D, dtype=dtype), normal(R, H, 1, D, dtype=dtype, seed=1)
    v, old = k.clone(), k.clone()
    positions, new_positions = torch.arange(20), torch.arange(13) * 3 + 10_000_019
    kv_splice_(k, v, new, new.clone(), p, spec, positions=positions, new_positions=new_positions, backend=backend)
    kept = p.rank_map >= 0
    delta = new_positions[p.rank_map[kept]] - positions[kept]
    oracle = turn(old[:, :, :20][:, :, kept], delta, spec.inv_freq)
    error = max_error(k[:, :, p.rank_map[kept]], oracle)
    bound = 4 * torch.finfo(dtype).eps * float(oracle.abs().max())
    assert error <= bound
    fresh = turn(new, new_positions[p.insert_slots], spec.inv_freq)
    assert max_error(k[:, :, p.insert_slots], fresh) <= bound
    in_fp32 = plain_turn(old[:, :, :20][:, :, kept].float(), delta, spec)
    assert max_error(in_fp32, oracle) > 0.2


def test_drift_after_ten_thousand_splices(backend: str, record_property: pytest.RecordProperty) -> None:
    """Rotated fp32 keys drift by at most one rounding a splice (the phase pair's own rounding adds up, as the same
    two angles return each time): bounded, and reported with the test."""
    spec = RopeSpec.from_theta(1e4, 8)
    raw = normal(1, 2, 12, 8)
    k = apply_rope(raw, torch.arange(12), spec)
    v = raw.clone()
    plans = [
        SplicePlan.from_edits(12, [Edit(2, 4, 1)], capacity=12),
        SplicePlan.from_edits(9, [Edit(2, 1, 4)], capacity=12),
    ]
    new = [raw[:, :, 2:3], raw[:, :, 2:6]]
    for i in range(10_000):
        kv_splice_(k, v, new[i % 2], new[i % 2], plans[i % 2], spec, backend=backend)
    assert same_bits(v, raw)
    exact = turn(raw, torch.arange(12), spec.inv_freq)
    drift = max_error(k, exact) / float(exact.abs().max())
    record_property("relative_drift_fp32_10000", drift)
    print(f"relative drift of fp32 keys after 10,000 re-rotations: {drift:.2e}")
    assert 0 < drift < 10_000 * torch.finfo(torch.float32).eps


def test_no_drift_in_unrotated_slots(backend: str) -> None:
    """10,000 splices of an unrotated slot cache: the bits of the survivors are those of the start."""
    raw = normal(1, 1, 12, 4, dtype=torch.bfloat16)
    k, v = raw.clone(), raw.clone()
    slots: Tensor | None = None
    length = 12
    for i in range(10_000):
        edit = Edit(2, 4, 1) if i % 2 == 0 else Edit(2, 1, 4)
        p = SplicePlan.from_edits(length, [edit], capacity=12, discipline="slots", slots=slots)
        new = raw[:, :, 2 : 2 + edit.insert]
        kv_splice_(k, v, new, new, p, backend=backend)
        slots, length = p.new_slots, p.new_length
    assert slots is not None
    assert slots.tolist() != list(range(12))
    assert same_bits(k[:, :, slots], raw)
    assert same_bits(v[:, :, slots], raw)
