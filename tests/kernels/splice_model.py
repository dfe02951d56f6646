"""What the splice tests share: a plain Python model of a cache's content and independent rotations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from mc_kernels import Edit, PageTable, RopeSpec, SplicePlan, kv_splice_, native
from mc_kernels.registry import IMPLS
from mc_kernels.rope import apply_rope
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Implementations that take CPU tensors here, `cpu` once per instruction set level of this machine.
BACKENDS = [
    name if name == "ref" else f"cpu-{level}"
    for name, impl in IMPLS["kv_splice_"].items()
    if name in ("ref", "cpu") and impl.available() is None
    for level in (native.isa_levels(matrix=False) if name == "cpu" else [""])
]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def bits(x: Tensor) -> Tensor:
    """The bytes of `x`, so that equality also holds for NaN and tells -0 from 0."""
    return x.detach().contiguous().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def splice_list(entries: Sequence[int], edits: Sequence[Edit], new: Sequence[int]) -> list[int]:
    """The edits on a plain list; `new` holds the inserted entries of all edits in order."""
    out, rank, taken = [], 0, 0
    for edit in edits:
        out += entries[rank : edit.start]
        out += new[taken : taken + edit.insert]
        rank, taken = edit.start + edit.remove, taken + edit.insert
    assert taken == len(new)
    return out + list(entries[rank:])


def turn(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool = False) -> Tensor:
    """fp64 rotation of x [..., n, D] at positions [n] by complex multiplication; inv_freq [D_rot/2] or one a row."""
    x, freq = x.double(), inv_freq.double()
    half = freq.shape[-1]
    angle = positions.double()[:, None] * freq[..., None, :]  # [n, half] or [R, n, half]
    if freq.dim() == 2:
        angle = angle[:, None]
    rot, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rot[..., 0::2], rot[..., 1::2]) if interleaved else rot.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    rot = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((rot, rest), -1)


def plain_turn(x: Tensor, positions: Tensor, spec: RopeSpec) -> Tensor:
    """The rotation as model code writes it, in x's dtype (fp32 angles; no magnitude): the error rule's rival."""
    half = spec.inv_freq.shape[-1]
    angle = positions.float()[:, None] * spec.inv_freq.float()[..., None, :]
    if spec.inv_freq.dim() == 2:
        angle = angle[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    rot, rest = x[..., : 2 * half], x[..., 2 * half :]
    if spec.interleaved:
        a, b = rot[..., 0::2], rot[..., 1::2]
        rot = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rot.chunk(2, -1)
        rot = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((rot, rest), -1)


def llama3(theta: float, dim: int) -> Tensor:
    """Llama 3.1's frequencies: long wavelengths are slowed by 8, those in between blended."""
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    blend = ((8192 / (2 * math.pi / freq) - 1) / 3).clamp(0, 1)
    return (1 - blend) * freq / 8 + blend * freq


def contents(old: Tensor, new: Tensor, p: SplicePlan) -> Tensor:
    """What a list says that the entries are, by rank: [..., new_length, D]."""
    pool = torch.cat((old[..., p.slots, :], new.view(*old.shape[:-2], -1, old.shape[-1])), dim=-2)
    edits = [Edit(*e) for e in p.edits.tolist()]
    return pool[..., splice_list(range(p.length), edits, range(p.length, p.length + p.n_insert)), :]


def origin_of(p: SplicePlan) -> Tensor:
    """By new rank: what a key still has to be turned by, its new position for an inserted one."""
    origin, kept = torch.arange(p.new_length), p.rank_map >= 0
    origin[p.rank_map[kept]] -= torch.arange(p.length)[kept]
    return origin


def check_fresh_rotation(
    p: SplicePlan, spec: RopeSpec, dtype: torch.dtype, rows: int, heads: int, dim: int, *, backend: str | None,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Turn keys at the old ranks, splice: as if every raw key were turned at its new rank (magnitude applied once)."""
    raw = normal(rows, heads, p.length, dim, dtype=dtype)
    k_new = normal(rows, heads, p.n_insert, dim, dtype=dtype, seed=1)
    k = torch.full((rows, heads, p.capacity, dim), float("nan"), dtype=dtype)
    k[:, :, : p.length] = apply_rope(raw, torch.arange(p.length), spec)
    stored = k[:, :, : p.length].clone()
    on_device = [x.to(device, copy=True) for x in (k, k, k_new, k_new)]
    kv_splice_(*on_device, p, spec, backend=backend)
    got = on_device[0].cpu()[:, :, p.new_slots]
    kept = p.rank_map >= 0
    to = p.rank_map[kept]
    delta = to - torch.arange(p.length)[kept]
    moved = turn(stored[:, :, kept], delta, spec.inv_freq, spec.interleaved)
    assert_within_error_rule(got[:, :, to], moved, plain_turn(stored[:, :, kept], delta, spec), what="survivors")
    fresh = turn(k_new, p.insert_ranks, spec.inv_freq, spec.interleaved) * spec.attention_scaling
    plain = plain_turn(k_new, p.insert_ranks, spec) * spec.attention_scaling
    assert_within_error_rule(got[:, :, p.insert_ranks], fresh, plain, what="inserted")
    scratch = turn(raw[:, :, kept], to, spec.inv_freq, spec.interleaved) * spec.attention_scaling
    assert max_error(got[:, :, to], scratch) <= 4 * torch.finfo(dtype).eps * float(scratch.abs().max())


@st.composite
def edits_of(draw: st.DrawFn, length: int, capacity: int) -> list[Edit]:
    out: list[Edit] = []
    rank, free = 0, capacity - length
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(rank, length))
        remove = draw(st.integers(0, min(6, length - start)))
        insert = draw(st.integers(0, min(6, free + remove)))
        out.append(Edit(start, remove, insert))
        rank, free = start + remove, free + remove - insert
    return out


@st.composite
def plans(draw: st.DrawFn, discipline: str) -> SplicePlan:
    capacity = draw(st.integers(0, 24))
    length = draw(st.integers(0, capacity))
    slots = draw(st.permutations(range(length))) if discipline == "slots" else None
    return SplicePlan.from_edits(
        length, draw(edits_of(length, capacity)), capacity=capacity, discipline=discipline, slots=slots
    )


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call on drawn plans, sizes and positions; without its dtype and its tensors' memory."""
    discipline = draw(st.sampled_from(["ordered", "slots"]))
    drawn = draw(st.lists(plans(discipline), min_size=1, max_size=3))
    capacity = max(p.capacity for p in drawn)
    layers, batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    dim = draw(st.sampled_from([1, 2, 5, 8, 14, 20, 33, 64, 80]))
    rows = layers * batch
    out: dict[str, Any] = {
        "size": (rows, heads, capacity, dim), "layers": layers, "seed": draw(st.integers(0, 99)),
        "gap": draw(st.sampled_from([0, 3])), "nhd": draw(st.booleans()), "plan": drawn[0], "rope": None,
        "page_size": draw(st.sampled_from([0, 0, 1, 3, 8])), "more_heads": draw(st.integers(0, 1)),
    }  # fmt: skip
    if len(drawn) > 1:
        out["plan"] = drawn
        out["rows"] = draw(st.lists(st.integers(-1, len(drawn) - 1), min_size=rows, max_size=rows))
    if draw(st.booleans()):
        half = draw(st.integers(0, dim // 2))
        freq = torch.rand((rows, half) if draw(st.booleans()) else (half,), generator=seeded(out["seed"]))
        out["rope"] = RopeSpec(freq, draw(st.booleans()), draw(st.sampled_from([1.0, 1.25])))
        for name, lengths in (
            ("positions", [p.length for p in drawn]), ("new_positions", [p.new_length for p in drawn]),
        ):  # fmt: skip
            # Runs of one delta, deltas that differ from entry to entry, deltas of zero, far positions.
            kind = draw(st.sampled_from(["none", "packed", "drawn", "far"]))
            if kind != "none":
                given_ = [positions(kind, n, out["seed"]) for n in lengths]
                out[name] = given_ if len(drawn) > 1 else given_[0]
    return out


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positions(kind: str, n: int, seed: int) -> Tensor:
    if kind == "packed":
        return torch.arange(n)
    return torch.randint(0, 4 if kind == "drawn" else 10**9, (n,), generator=seeded(seed))


def memory(call: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """k, v as [L, B, Hkv, S, D] and k_new, v_new of the call; unused slots, removed entries and padding hold NaN."""
    rows, heads, capacity, dim = call["size"]
    several = call["plan"] if isinstance(call["plan"], list) else [call["plan"]]
    rows_of = call.get("rows", [0] * rows)
    most = max(p.n_insert for p in several)
    cache = [torch.full((rows, heads, capacity, dim), float("nan")) for _ in range(2)]
    fresh = [torch.full((rows, heads, most, dim), float("nan")) for _ in range(2)]
    for i, (x, new) in enumerate(zip(cache, fresh, strict=True)):
        for r, index in enumerate(rows_of):
            if index < 0:
                continue
            p = several[index]
            kept = p.slots[p.rank_map >= 0]
            x[r][:, kept] = normal(heads, len(kept), dim, seed=call["seed"] + i)
            new[r, :, : p.n_insert] = normal(heads, p.n_insert, dim, seed=call["seed"] + i + 2)
    five = [x.view(call["layers"], rows // call["layers"], *x.shape[1:]).to(dtype) for x in cache]
    return five, [x.to(dtype) for x in fresh]


class _Elsewhere:
    """A guarded tensor on another device: `view` there, `check()` after copying everything back."""

    def __init__(self, source: Tensor, gap: int, device: str) -> None:
        self.guarded = Guarded(source, gap=gap)
        self.bytes = self.guarded.bytes.to(device)
        here = self.guarded.view
        self.view = self.bytes.view(here.dtype).as_strided(here.shape, here.stride(), here.storage_offset())

    def check(self) -> None:
        self.guarded.bytes.copy_(self.bytes)
        self.guarded.check()


def drawn_call(
    call: dict[str, Any], dtype: torch.dtype, backend: str, *, in_dtype: torch.dtype | None = None, device: str = "cpu"
) -> list[Tensor]:
    """Run a call of `calls()` in guarded memory. Returns k and v afterwards, [L, B, Hkv, S, D]; the paged form is taken
    apart again. in_dtype: what numbers of `dtype` are widened to first."""
    cache, fresh = ([x.to(in_dtype or dtype) for x in part] for part in memory(call, dtype))
    kwargs = {name: call[name] for name in ("rows", "positions", "new_positions") if name in call}
    page = call["page_size"]
    capacity, batch = call["size"][2], cache[0].shape[1]
    table = None
    if page:
        per_row = max(-(-capacity // page), 1)
        table = torch.randperm(batch * per_row + 1, generator=seeded(5))[:-1].view(batch, per_row)
        kwargs["pages"] = PageTable(table.to(device), page)
        cache = [to_pages(x, table, page) for x in cache]
    heads = cache[0].shape[2]
    whole = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, call["more_heads"]), value=7.0) for x in cache]
    guarded = [_Elsewhere(x.transpose(2, 3) if call["nhd"] else x, call["gap"], device) for x in whole]
    new = [_Elsewhere(x, call["gap"], device) for x in fresh]
    wide = [g.view.transpose(2, 3) if call["nhd"] else g.view for g in guarded]
    views = [x[:, :, :heads] for x in wide]
    kv_splice_(*views, *(g.view for g in new), call["plan"], call["rope"], backend=backend, **kwargs)
    for g, x in zip(guarded + new, cache + fresh, strict=True):
        g.check()
        if x is fresh[0] or x is fresh[1]:
            assert same_bits(g.view.cpu(), x)
    assert all((x[:, :, heads:] == 7).all() for x in wide)
    views = [x.cpu() for x in views]
    if table is None:
        return [x.clone() for x in views]
    return [x[:, table].movedim(2, 3).flatten(3, 4)[:, :, :, :capacity] for x in views]


def to_pages(x: Tensor, table: Tensor, page: int) -> Tensor:
    pool = torch.full((x.shape[0], table.numel() + 1, x.shape[2], page, x.shape[4]), float("nan"), dtype=x.dtype)
    padded = torch.nn.functional.pad(x, (0, 0, 0, table.shape[1] * page - x.shape[3]), value=float("nan"))
    pool[:, table] = padded.unflatten(3, (table.shape[1], page)).movedim(3, 2)
    return pool
