"""Checks of a splice on shapes, plans, maps and page tables, whatever kind of array holds them: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .contracts import Strided, check_contiguous_rows, check_same_dtype, check_shape, describe
from .memory import Layout
from .splicing import Ints, SplicePlan


class Plan(Protocol):
    """What a plan has in plain numbers, be it in arrays or in tensors."""

    @property
    def length(self) -> int: ...
    @property
    def new_length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def discipline(self) -> str: ...
    @property
    def n_insert(self) -> int: ...
    @property
    def segments(self) -> Any: ...
    @property
    def stays(self) -> Any: ...


class Pages(Protocol):
    """Sizes of a page table: [sequences, max_pages] pages of page_size slots."""

    @property
    def page_size(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def capacity(self) -> int: ...


def check_views(given: Mapping[str, Any], pages: Pages | None) -> tuple[int, int]:
    """k, v, k_new and v_new by name: shapes, one dtype, contiguous rows. Returns the number of rows R and the slots of
    one."""
    k, v = given["k"], given["v"]
    dims: dict[str, int] = {}
    shape: tuple[int | str, ...]
    if pages is None:
        shape = ("R", "Hkv", "S", "D") if k.dim() == 4 else ("L", "B", "Hkv", "S", "D")
    else:
        shape = ("P", "Hkv", pages.page_size, "D") if k.dim() == 4 else ("L", "P", "Hkv", pages.page_size, "D")
    check_shape("k", k, shape, dims)
    check_shape("v", v, shape, dims)
    layers = k.shape[0] if k.dim() == 5 else 1
    if pages is None:
        dims["R"] = layers * k.shape[-4]
    else:
        dims |= {"R": layers * pages.sequences, "S": pages.capacity}
    for name in ("k_new", "v_new"):
        check_shape(name, given[name], ("R", "Hkv", "M", "D"), dims)
    check_same_dtype(("k", k), **{name: given[name] for name in ("v", "k_new", "v_new")})
    for name, x in given.items():
        check_contiguous_rows(name, x)
    return dims["R"], dims["S"]


def check_aliasing(given: Mapping[str, Strided]) -> None:
    """No two indices of k or v name one element; k, v and what is inserted share none (k_new with v_new may)."""
    layouts = {name: Layout(x) for name, x in given.items()}
    for name in ("k", "v"):
        if layouts[name].overlaps_itself():
            strides = list(given[name].stride())
            raise ValueError(f"{name}: expected a view without overlap, got {describe(given[name])}, strides {strides}")
    for a, b in (("k", "v"), ("k", "k_new"), ("k", "v_new"), ("v", "k_new"), ("v", "v_new")):
        if layouts[a].shares(layouts[b]):
            raise ValueError(f"{b}: expected memory apart from {a}, got views that share elements")


def check_plans(plans: Sequence[Plan], kind: type, n_slots: int, n_new: int) -> None:
    """At least one plan, all of `kind` and of one discipline, within the cache; M inserted entries are enough."""
    if not plans:
        raise ValueError("plan: expected at least one SplicePlan, got none")
    for i, p in enumerate(plans):
        name = f"plan[{i}]" if len(plans) > 1 else "plan"
        if not isinstance(p, kind):
            raise TypeError(f"{name}: expected a SplicePlan, got {describe(p)}")
        if p.capacity > n_slots:
            raise ValueError(f"{name}: expected capacity <= {n_slots}, the slots of the cache, got {p.capacity}")
        if p.discipline != plans[0].discipline:
            raise ValueError(f"{name}: expected discipline {plans[0].discipline!r} as plan[0], got {p.discipline!r}")
    most = max(p.n_insert for p in plans)
    if n_new < most or (len(plans) == 1 and n_new != most):
        raise ValueError(f"k_new: expected M = {most} inserted entries (those of the plan), got M = {n_new}")


def check_row_range(low: int, high: int, n_plans: int) -> None:
    if low < -1 or high >= n_plans:
        raise ValueError(f"rows: expected indices in -1..{n_plans - 1}, got {low}..{high}")


def plan_offsets(plans: Sequence[Plan]) -> list[list[int]]:
    """[P+1, 5], where plan p's part begins (row p) and ends (row p+1): in segments, stays, insert_slots, positions,
    new_positions."""
    ends = [[0, 0, 0, 0, 0]]
    for p in plans:
        sizes = (p.segments.shape[0], p.stays.shape[0], p.n_insert, p.length, p.new_length)
        ends.append([a + b for a, b in zip(ends[-1], sizes, strict=True)])
    return ends


def _written_pages(plan: SplicePlan, page_size: int, before: Ints | None, after: Ints | None) -> Ints:
    """Logical pages that the plan writes (inserts, destinations of moves, re-rotated entries)."""
    written = [plan.insert_slots, plan.moves[:, 1]]
    if before is not None and after is not None:
        both = min(plan.length, plan.new_length)
        written.append(np.flatnonzero(before[:both] != after[:both]))
    return np.unique(np.concatenate(written) // page_size)


def check_pages(
    table: Ints,
    page_size: int,
    n_pages: int,
    plans: Sequence[SplicePlan],
    plan_of: Ints,
    before: Ints | None,
    after: Ints | None,
) -> None:
    """Page ids in range, and no written page used by another sequence or twice by its own.

    table [B, max_pages]; plan_of [L, B]: the plan of each row; before, after: positions by slot, concatenated over
    plans, or None where nothing is rotated. Sequences may share pages that nothing writes (a common prefix). Of a
    sequence that no row edits the length is not known, so its pages are not looked at.
    """
    if not plan_of.size:
        return
    used: list[Ints] = []
    written: list[Ints] = []
    starts = np.cumsum([[0, 0]] + [[p.length, p.new_length] for p in plans], axis=0)
    for b in range(table.shape[0]):
        logical_used, logical_written = 0, [np.zeros(0, np.int64)]
        for p in set(plan_of[:, b].tolist()) - {-1}:
            plan = plans[p]
            logical_used = max(logical_used, -(-max(plan.length, plan.new_length) // page_size))
            old, new = (
                None if x is None else x[starts[p, i] : starts[p + 1, i]] for i, x in enumerate((before, after))
            )
            logical_written.append(_written_pages(plan, page_size, old, new))
        ids = table[b, :logical_used].astype(np.int64)
        bad = (ids < 0) | (ids >= n_pages)
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(f"pages: expected table[{b}, {i}] in 0..{n_pages - 1}, got {int(ids[i])}")
        used.append(ids)
        written.append(ids[np.unique(np.concatenate(logical_written))])
    count = np.bincount(np.concatenate(used), minlength=n_pages)
    for b, ids in enumerate(written):
        shared = ids[count[ids] > 1]
        if shared.size:
            raise ValueError(f"pages: expected page {int(shared[0])}, written for sequence {b}, to be used only once")
