"""Checks of `kv_splice_` on tensors, all before anything is written. What needs no torch is in `splice_checks`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import splice_checks
from ..checks import (
    CACHE_DTYPES,
    FP8,
    INDEX_DTYPES,
    can_look_at,
    can_read,
    check_same_device,
    check_shape,
    check_tensor,
    describe,
)
from ..rope import RopeSpec
from .plan import PageTable, SplicePlan


def _usual(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor) -> bool:
    """Whether a few looks show that every check of `check_cache` would pass, as for k and v in one layout, apart or
    interleaved, on a CPU or a GPU, and contiguous new entries elsewhere. Between two decoded tokens the full checks,
    which know what to say, take five times as long: none of their code is in the caches then."""
    if type(k) is not Tensor or not (k.is_cpu or k.is_cuda):
        return False
    for x in (k, v, k_new, v_new):
        if type(x) is not Tensor or x.dtype is not k.dtype or x.requires_grad or not x.numel():
            return False
        if x.device != k.device:
            return False
    shape, strides, size = k.shape, k.stride(), k.element_size()
    if k.dtype not in CACHE_DTYPES or len(shape) not in (4, 5) or v.shape != shape or v.stride() != strides:
        return False
    new = (shape[0] if len(shape) == 4 else shape[0] * shape[1], shape[-3], k_new.shape[-2], shape[-1])
    if k_new.shape != new or v_new.shape != new or not (k_new.is_contiguous() and v_new.is_contiguous()):
        return False
    if strides[-1] != 1:
        return False
    outer = inner = reach = 0  # elements: the largest step, what the smaller ones reach, what all of them reach
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1:
            if step <= reach:
                return False
            outer, inner = step, reach
            reach += (n - 1) * step
    first, second = sorted((k.data_ptr(), v.data_ptr()))
    distance, odd = divmod(second - first, size)
    if odd or not (distance > reach or inner < distance < outer - inner):
        return False
    end = second + (reach + 1) * size
    return all(x.data_ptr() >= end or x.data_ptr() + x.numel() * size <= first for x in (k_new, v_new))


def check_cache(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, pages: PageTable | None
) -> tuple[Tensor, Tensor, int, int]:
    """Returns k and v with their layer dimension [L, B or P, Hkv, S, D], the number of rows R, the slots of a row."""
    if pages is None and not torch.compiler.is_compiling() and _usual(k, v, k_new, v_new):
        k, v = (k[None], v[None]) if k.dim() == 4 else (k, v)
        return k, v, k_new.shape[0], k.shape[-2]
    given = {"k": k, "v": v, "k_new": k_new, "v_new": v_new}
    for name, x in given.items():
        check_tensor(name, x, CACHE_DTYPES)
    if pages is not None and not isinstance(pages, PageTable):
        raise TypeError(f"pages: expected a PageTable, got {describe(pages)}")
    n_rows, n_slots = splice_checks.check_views(given, pages)
    table = None if pages is None else pages.table
    check_same_device(("k", k), v=v, k_new=k_new, v_new=v_new, pages=table)
    for name, x in given.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires no gradient (the op has no backward)")
    if can_look_at(*given.values()):
        splice_checks.check_aliasing(given)
    k, v = (k[None], v[None]) if k.dim() == 4 else (k, v)
    return k, v, n_rows, n_slots


def movable(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, ...]:
    """The tensors as every backend moves them: of fp8, two elements as one of 16 bits. Without rotation a splice is a
    move of bytes, whatever they mean."""
    if k.dtype != FP8:
        return k, v, k_new, v_new
    for name, x in (("k", k), ("v", v), ("k_new", k_new), ("v_new", v_new)):
        offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
        if any(n % 2 for n in (x.shape[-1], offset, *x.stride()[:-1])):
            raise ValueError(
                f"{name}: expected float8_e4m3fn entries that begin on 2 bytes (even D and strides), got {describe(x)},"
                f" strides {list(x.stride())}"
            )
    return tuple(x.view(torch.bfloat16) for x in (k, v, k_new, v_new))


def check_plans(
    plans: Sequence[SplicePlan], rows: Tensor | Sequence[int] | None, n_rows: int, n_slots: int, n_new: int
) -> Tensor | None:
    """Plans against the cache and the inserted entries; returns `rows` as an int64 tensor on the CPU, or None."""
    splice_checks.check_plans(plans, SplicePlan, n_slots, n_new)
    if rows is None:
        if len(plans) > 1:
            raise ValueError(f"rows: expected the plan of each of R={n_rows} rows with {len(plans)} plans, got None")
        return None
    given = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.int64, device="cpu")
    check_tensor("rows", given, INDEX_DTYPES)
    if given.shape != (n_rows,):
        raise ValueError(f"rows: expected shape [R] with R={n_rows}, got {describe(given)}")
    given = given.to("cpu", torch.int64)
    if n_rows and can_look_at(given):
        splice_checks.check_row_range(int(given.min()), int(given.max()), len(plans))
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
        if length and can_read(x) and int(x.min()) < 0:
            raise ValueError(f"{label}: expected positions >= 0, got {int(x.min())}")


def check_rope(rope: RopeSpec | None, n_rows: int, k: Tensor) -> tuple[Tensor | None, bool, float]:
    if rope is None:
        return None, False, 1.0
    if not isinstance(rope, RopeSpec):
        raise TypeError(f"rope: expected a RopeSpec or None, got {describe(rope)}")
    if k.dtype == FP8:
        raise ValueError(
            "rope: expected None for a float8_e4m3fn cache (keys would be rounded to it again), got a RopeSpec"
        )
    rope.check_head_dim(k.shape[-1])
    if rope.inv_freq.dim() == 2 and rope.inv_freq.shape[0] != n_rows:
        raise ValueError(f"rope: expected inv_freq [D_rot/2] or [R={n_rows}, D_rot/2], got {describe(rope.inv_freq)}")
    return rope.inv_freq_on(k.device), rope.interleaved, rope.attention_scaling


def check_pages(
    pages: PageTable,
    k: Tensor,
    plans: Sequence[SplicePlan],
    rows: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
) -> None:
    """Page ids in range, and no written page used by another sequence or twice by its own."""
    if not can_look_at(k) or not can_read(pages.table, *(x for x in (before, after) if x is not None)):
        return
    table = pages.table.cpu().numpy()
    by_layer = (k.shape[0], table.shape[0])
    plan_of = np.zeros(by_layer, np.int64) if rows is None else rows.numpy().reshape(by_layer)
    host = (None if x is None else x.cpu().numpy() for x in (before, after))
    splice_checks.check_pages(table, pages.page_size, k.shape[1], [p.arrays for p in plans], plan_of, *host)
