"""Checks of `kv_splice_`, all before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..checks import (
    INDEX_DTYPES,
    ORACLE_DTYPES,
    check_contiguous_rows,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    describe,
)
from ..rope import RopeSpec
from .memory import Layout
from .plan import Ints, PageTable, SplicePlan


def check_cache(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, pages: PageTable | None
) -> tuple[Tensor, Tensor, int, int]:
    """Returns k and v with their layer dimension [L, B or P, Hkv, S, D], the number of rows R, the slots of a row."""
    given = {"k": k, "v": v, "k_new": k_new, "v_new": v_new}
    for name, x in given.items():
        check_tensor(name, x, ORACLE_DTYPES)
    dims: dict[str, int] = {}
    shape: tuple[int | str, ...]
    if pages is None:
        shape = ("R", "Hkv", "S", "D") if k.dim() == 4 else ("L", "B", "Hkv", "S", "D")
    elif isinstance(pages, PageTable):
        shape = ("P", "Hkv", pages.page_size, "D") if k.dim() == 4 else ("L", "P", "Hkv", pages.page_size, "D")
    else:
        raise TypeError(f"pages: expected a PageTable, got {describe(pages)}")
    check_shape("k", k, shape, dims)
    check_shape("v", v, shape, dims)
    k, v = (k[None], v[None]) if k.dim() == 4 else (k, v)
    if pages is None:
        dims["R"] = k.shape[0] * k.shape[1]
    else:
        dims |= {"R": k.shape[0] * pages.table.shape[0], "S": pages.capacity}
    check_shape("k_new", k_new, ("R", "Hkv", "M", "D"), dims)
    check_shape("v_new", v_new, ("R", "Hkv", "M", "D"), dims)
    check_same_dtype(("k", k), v=v, k_new=k_new, v_new=v_new)
    table = None if pages is None else pages.table
    check_same_device(("k", k), v=v, k_new=k_new, v_new=v_new, pages=table)
    for name, x in given.items():
        check_contiguous_rows(name, x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires no gradient (the op has no backward)")
    if not torch.compiler.is_compiling():
        _check_aliasing(given)
    return k, v, dims["R"], dims["S"]


def _check_aliasing(given: dict[str, Tensor]) -> None:
    layouts = {name: Layout(x) for name, x in given.items()}
    for name in ("k", "v"):
        if layouts[name].overlaps_itself():
            strides = list(given[name].stride())
            raise ValueError(f"{name}: expected a view without overlap, got {describe(given[name])}, strides {strides}")
    for a, b in (("k", "v"), ("k", "k_new"), ("k", "v_new"), ("v", "k_new"), ("v", "v_new")):
        if layouts[a].shares(layouts[b]):
            raise ValueError(f"{b}: expected memory apart from {a}, got views that share elements")


def check_plans(
    plans: Sequence[SplicePlan], rows: Tensor | Sequence[int] | None, n_rows: int, n_slots: int, n_new: int
) -> Tensor | None:
    """Plans against the cache and the inserted entries; returns `rows` as an int64 tensor on the CPU, or None."""
    if not plans:
        raise ValueError("plan: expected at least one SplicePlan, got none")
    for i, p in enumerate(plans):
        name = f"plan[{i}]" if len(plans) > 1 else "plan"
        if not isinstance(p, SplicePlan):
            raise TypeError(f"{name}: expected a SplicePlan, got {describe(p)}")
        if p.capacity > n_slots:
            raise ValueError(f"{name}: expected capacity <= {n_slots}, the slots of the cache, got {p.capacity}")
        if p.discipline != plans[0].discipline:
            raise ValueError(f"{name}: expected discipline {plans[0].discipline!r} as plan[0], got {p.discipline!r}")
    most = max(p.n_insert for p in plans)
    if n_new < most or (len(plans) == 1 and n_new != most):
        raise ValueError(f"k_new: expected M = {most} inserted entries (those of the plan), got M = {n_new}")
    if rows is None:
        if len(plans) > 1:
            raise ValueError(f"rows: expected the plan of each of R={n_rows} rows with {len(plans)} plans, got None")
        return None
    given = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.int64)
    check_tensor("rows", given, INDEX_DTYPES)
    if given.shape != (n_rows,):
        raise ValueError(f"rows: expected shape [R] with R={n_rows}, got {describe(given)}")
    given = given.to("cpu", torch.int64)
    if not torch.compiler.is_compiling() and n_rows:
        low, high = int(given.min()), int(given.max())
        if low < -1 or high >= len(plans):
            raise ValueError(f"rows: expected indices in -1..{len(plans) - 1}, got {low}..{high}")
    return given


def check_positions(
    name: str,
    given: Tensor | Sequence[Tensor] | None,
    rope: RopeSpec | None,
    lengths: Sequence[int],
    device: torch.device,
) -> None:
    if given is None:
        return
    if rope is None:
        raise ValueError(f"{name}: expected None without rope (nothing is rotated), got positions")
    parts = (given,) if isinstance(given, Tensor) else tuple(given)
    if len(parts) != len(lengths):
        raise ValueError(f"{name}: expected one tensor for each of {len(lengths)} plans, got {len(parts)}")
    for i, (x, length) in enumerate(zip(parts, lengths, strict=True)):
        label = name if isinstance(given, Tensor) else f"{name}[{i}]"
        check_tensor(label, x, (torch.int64,))
        check_shape(label, x, (length,), {})
        if x.device.type != "cpu" and x.device != device:
            raise TypeError(f"{label}: expected device cpu or {device}, got {describe(x)}")
        if not torch.compiler.is_compiling() and length and int(x.min()) < 0:
            raise ValueError(f"{label}: expected positions >= 0, got {int(x.min())}")


def check_rope(rope: RopeSpec | None, n_rows: int, k: Tensor) -> tuple[Tensor | None, bool, float]:
    if rope is None:
        return None, False, 1.0
    if not isinstance(rope, RopeSpec):
        raise TypeError(f"rope: expected a RopeSpec or None, got {describe(rope)}")
    rope.check_head_dim(k.shape[-1])
    if rope.inv_freq.dim() == 2 and rope.inv_freq.shape[0] != n_rows:
        raise ValueError(f"rope: expected inv_freq [D_rot/2] or [R={n_rows}, D_rot/2], got {describe(rope.inv_freq)}")
    return rope.inv_freq_on(k.device), rope.interleaved, rope.attention_scaling


def _written_pages(plan: SplicePlan, page_size: int, before: Ints | None, after: Ints | None, rope: bool) -> Ints:
    """Logical pages that the plan writes (inserts, destinations of moves, re-rotated entries)."""
    written = [plan.insert_slots.numpy(), plan.moves.numpy()[:, 1]]
    if rope and before is not None and after is not None:
        both = min(plan.length, plan.new_length)
        written.append(np.flatnonzero(before[:both] != after[:both]))
    return np.unique(np.concatenate(written) // page_size)


def check_pages(
    pages: PageTable,
    k: Tensor,
    plans: Sequence[SplicePlan],
    rows: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
) -> None:
    """Page ids in range, and no written page used by another sequence or twice by its own.

    Sequences may share pages that nothing writes (a common prefix). Of a sequence that no row edits the length is not
    known, so its pages are not looked at.
    """
    if torch.compiler.is_compiling():
        return
    table = pages.table.cpu().numpy()
    n_seq = table.shape[0]
    if not n_seq or not k.shape[0]:
        return
    plan_of = np.zeros((k.shape[0], n_seq), np.int64) if rows is None else rows.numpy().reshape(-1, n_seq)
    used: list[Ints] = []
    written: list[Ints] = []
    starts = np.cumsum([[0, 0]] + [[p.length, p.new_length] for p in plans], axis=0)
    host = [None if x is None else x.cpu().numpy() for x in (before, after)]
    for b in range(n_seq):
        logical_used, logical_written = 0, [np.zeros(0, np.int64)]
        for p in set(plan_of[:, b].tolist()) - {-1}:
            plan = plans[p]
            logical_used = max(logical_used, -(-max(plan.length, plan.new_length) // pages.page_size))
            old, new = (None if x is None else x[starts[p, i] : starts[p + 1, i]] for i, x in enumerate(host))
            logical_written.append(_written_pages(plan, pages.page_size, old, new, before is not None))
        ids = table[b, :logical_used].astype(np.int64)
        bad = (ids < 0) | (ids >= k.shape[1])
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(f"pages: expected table[{b}, {i}] in 0..{k.shape[1] - 1}, got {int(ids[i])}")
        used.append(ids)
        written.append(ids[np.unique(np.concatenate(logical_written))])
    count = np.bincount(np.concatenate(used), minlength=k.shape[1])
    for b, ids in enumerate(written):
        shared = ids[count[ids] > 1]
        if shared.size:
            raise ValueError(f"pages: expected page {int(shared[0])}, written for sequence {b}, to be used only once")
