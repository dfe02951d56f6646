"""`kv_splice_` on arrays of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import extension, splice_checks
from ..contracts import check_same_device, describe
from ..splicing import Ints, SplicePlan
from .device import Device
from .rope import RopeSpec
from .views import FLOATS, array, check_writable, integers


@dataclass(frozen=True, eq=False)
class PageTable:
    """Where the slots of each sequence lie in a paged cache, as `mc_kernels.PageTable`: slot s of sequence b is row
    s % page_size of page table[b, s // page_size].

    table: [B, max_pages] integers, any kind of array; kept as int64. Entries beyond a sequence's pages are never read.

    Raises TypeError (dtype) or ValueError (shape, value).
    """

    table: Any
    page_size: int

    def __post_init__(self) -> None:
        table = integers("table", self.table)
        if table.ndim != 2:
            raise ValueError(f"table: expected shape [B, max_pages], got shape {list(table.shape)}")
        if isinstance(self.page_size, bool) or not isinstance(self.page_size, int):
            raise TypeError(f"page_size: expected an int, got {describe(self.page_size)}")
        if self.page_size < 1:
            raise ValueError(f"page_size: expected at least 1, got {self.page_size!r}")
        object.__setattr__(self, "table", table)

    @property
    def sequences(self) -> int:
        return int(self.table.shape[0])

    @property
    def capacity(self) -> int:
        return int(self.table.shape[1]) * self.page_size


def _rows(given: Any, n_rows: int, n_plans: int) -> Ints | None:
    if given is None:
        if n_plans > 1:
            raise ValueError(f"rows: expected the plan of each of R={n_rows} rows with {n_plans} plans, got None")
        return None
    rows = integers("rows", given)
    if rows.shape != (n_rows,):
        raise ValueError(f"rows: expected shape [R] with R={n_rows}, got shape {list(rows.shape)}")
    if n_rows:
        splice_checks.check_row_range(int(rows.min()), int(rows.max()), n_plans)
    return rows


def _positions(name: str, given: Any, rope: RopeSpec | None, maps: Sequence[Ints], several: bool) -> Ints | None:
    """Positions by slot, concatenated over plans; an entry's rank where none are given (maps: rank to slot)."""
    parts = []
    if given is None:
        for slots in maps:
            ranks = np.empty_like(slots)
            ranks[slots] = np.arange(slots.size)
            parts.append(ranks)
        return np.concatenate(parts)
    if rope is None:
        raise ValueError(f"{name}: expected None without rope (nothing is rotated), got positions")
    of_plans = list(given) if several else [given]
    if len(of_plans) != len(maps):
        raise ValueError(f"{name}: expected one array for each of {len(maps)} plans, got {len(of_plans)}")
    for i, (x, slots) in enumerate(zip(of_plans, maps, strict=True)):
        label = f"{name}[{i}]" if several else name
        values = integers(label, x)
        if values.shape != slots.shape:
            raise ValueError(f"{label}: expected shape [{slots.size}], got shape {list(values.shape)}")
        if values.size and values.min() < 0:
            raise ValueError(f"{label}: expected positions >= 0, got {values.min()}")
        parts.append(values)
    return np.concatenate(parts)


def _address(x: npt.NDArray[Any] | None) -> int:
    return 0 if x is None else int(x.ctypes.data)


def kv_splice_(
    k: Any,
    v: Any,
    k_new: Any,
    v_new: Any,
    plan: SplicePlan | Sequence[SplicePlan],
    rope: RopeSpec | None = None,
    *,
    rows: Any = None,
    positions: Any = None,
    new_positions: Any = None,
    pages: PageTable | None = None,
    n_threads: int = 0,
) -> None:
    """Splice a KV cache in place: `mc_kernels.kv_splice_` on arrays, with the same arguments and the same bits.

    Args:
        k, v: [R, Hkv, S, D] (R = layers x batch) or [L, B, Hkv, S, D] (row r = layer * B + b), with `pages`
            [L, P, Hkv, page_size, D] or [P, Hkv, page_size, D]; fp32, bf16 or fp16, any strides >= 0 with a contiguous
            last dimension. Written: arrays that may be (JAX's may not).
        k_new, v_new: [R, Hkv, M, D] inserted entries of all edits in timeline order, keys unrotated.
        plan: a `mc_kernels.array.SplicePlan`, or several (of one discipline) with `rows`.
        rope: keys are stored rotated and turn with their positions. None: they are not, or keep their rotation.
        rows: [R] index of each row's plan, -1 for a row that is left alone. None: one plan for all rows.
        positions, new_positions: integers >= 0 by slot, [length] before and [new_length] after (several plans: a list).
            Default: the entry's rank. Only with `rope`.
        pages: the page table of a paged cache. A page that is written must not be used twice.
        n_threads: at most this many threads; 0: OMP_NUM_THREADS, or one a processor. The result does not depend on it.

    Raises TypeError (no array, dtype, device, read-only), ValueError (shape, stride, value, aliasing), all before
    anything is written, or RuntimeError where the package was built without its native library.
    """
    given = {
        name: array(name, x, FLOATS, cuda=True) for name, x in (("k", k), ("v", v), ("k_new", k_new), ("v_new", v_new))
    }  # fmt: skip
    if pages is not None and not isinstance(pages, PageTable):
        raise TypeError(f"pages: expected a mc_kernels.array.PageTable, got {describe(pages)}")
    n_rows, n_slots = splice_checks.check_views(given, pages)
    check_same_device(("k", given["k"]), v=given["v"], k_new=given["k_new"], v_new=given["v_new"])
    for name in ("k", "v"):
        check_writable(name, given[name])
    splice_checks.check_aliasing(given)
    several = isinstance(plan, Sequence)
    plans: tuple[SplicePlan, ...] = tuple(plan) if isinstance(plan, Sequence) else (plan,)
    splice_checks.check_plans(plans, SplicePlan, n_slots, given["k_new"].shape[2])
    of_rows = _rows(rows, n_rows, len(plans))
    if rope is not None:
        if not isinstance(rope, RopeSpec):
            raise TypeError(f"rope: expected a mc_kernels.array.RopeSpec or None, got {describe(rope)}")
        rope.check_head_dim(given["k"].shape[-1])
        if rope.inv_freq.ndim == 2 and rope.inv_freq.shape[0] != n_rows:
            raise ValueError(
                f"rope: expected inv_freq [D_rot/2] or [R={n_rows}, D_rot/2], got shape {list(rope.inv_freq.shape)}"
            )
    before = _positions("positions", positions, rope, [p.slots for p in plans], several)
    after = _positions("new_positions", new_positions, rope, [p.new_slots for p in plans], several)
    packed = plans[0].discipline == "ordered" and positions is None and new_positions is None
    if rope is None or packed:  # an entry's position is its slot
        before = after = None
    kk, vv = (x.split_first(1) if x.dim() == 4 else x for x in (given["k"], given["v"]))
    if pages is not None:
        by_layer = (kk.shape[0], pages.sequences)
        plan_of = np.zeros(by_layer, np.int64) if of_rows is None else of_rows.reshape(by_layer)
        splice_checks.check_pages(pages.table, pages.page_size, kk.shape[1], plans, plan_of, before, after)
    # Held in names: the library gets addresses.
    offsets = np.array(splice_checks.plan_offsets(plans), dtype=np.int64)
    segments, stays, insert_slots = (
        np.ascontiguousarray(np.concatenate([getattr(p, name) for p in plans]), dtype=np.int64)
        for name in ("segments", "stays", "insert_slots")
    )
    table = None if pages is None else pages.table
    freq = None if rope is None else rope.inv_freq
    views = [x.view() for x in (kk, vv, given["k_new"], given["v_new"])]
    plan_ = (len(plans), *(_address(x) for x in (offsets, of_rows, segments, stays, insert_slots)))
    rows_of_freq = 0 if freq is None else 1 if freq.ndim == 1 else freq.shape[0]
    turn = (
        0 if freq is None else freq.shape[-1],
        rope is not None and rope.interleaved,
        1.0 if rope is None else rope.attention_scaling,
    )
    if kk.device == "cpu":
        page_view = None if table is None else array("table", table, ("int64",)).view()
        by_slot = _address(before), _address(after), rows_of_freq, _address(freq)
        extension.library().kv_splice(*views, page_view, *plan_, *by_slot, *turn, n_threads)
        return
    with Device(kk) as device:
        there = [None if x is None else device.put(x) for x in (table, before, after, freq)]
        page_view = None if there[0] is None else there[0].view()
        at = [0 if x is None else x.address for x in there[1:]]
        arguments = (*views, page_view, *plan_, *at[:2], rows_of_freq, at[2], *turn)
        device.launch(lambda where: int(device.library.kv_splice(*arguments, where)))
