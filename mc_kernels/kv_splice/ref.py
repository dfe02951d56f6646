"""Oracle of `kv_splice_`: entries of a KV cache are removed, inserted and moved in place.

    survivors   k[r,h,dst] <- R(new_positions[dst] - positions[src]) k[r,h,src]      v[r,h,dst] <- v[r,h,src]
    inserted    k[r,h,slot_j] <- R(new_positions[slot_j]) k_new[r,h,j] * scaling     v[r,h,slot_j] <- v_new[r,h,j]

k, v [L,B,Hkv,S,D], or paged [L,P,Hkv,page,D]; k_new, v_new [R,Hkv,M,D] with R = L*B and row r = layer*B + b. R(.) is
the rotation of `rope`, or nothing without one. The angle is reduced in fp64, the rotation computed in fp32 (fp64 for
fp64) and rounded once; where the difference of positions is zero the bits are copied. Only survivors and the inserted
entries of a row's own plan are read; only their destinations are written. The oracle gathers, then scatters; a kernel
works in place (see `SplicePlan.segments` for a safe order).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from ..registry import register
from ..rope import phases, rotate
from ..splicing import expand_ranges


def expand_segments(segments: Tensor) -> tuple[Tensor, Tensor]:
    """segments [n, 3] (source, destination, count) -> source and destination of every entry, [N] each."""
    source, destination, count = segments.numpy().T
    return torch.from_numpy(expand_ranges(source, count)), torch.from_numpy(expand_ranges(destination, count))


def _index(k: Tensor, table: Tensor | None, rows: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
    """Index tuple that addresses [rows, Hkv, slots] (and leaves D) in the contiguous or the paged form."""
    heads = torch.arange(k.shape[-3], device=k.device)[None, :, None]
    per_layer = k.shape[1] if table is None else table.shape[0]
    layer, b = rows // per_layer, rows % per_layer
    if table is None:
        return layer[:, None, None], b[:, None, None], heads, slots[None, None, :]
    page_size = k.shape[-2]
    pages = table.to(k.device, torch.int64)[b[:, None], slots[None, :] // page_size]
    return layer[:, None, None], pages[:, None, :], heads, (slots % page_size)[None, None, :]


def _phases(delta: Tensor, inv_freq: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [r or 1, 1, n, D_rot/2] for deltas [n]."""
    cos, sin = phases(delta, inv_freq if inv_freq.dim() == 1 else inv_freq[rows], dtype)
    if inv_freq.dim() == 1:
        cos, sin = cos[None], sin[None]
    return cos[:, None], sin[:, None]


@register("kv_splice_", "ref")
def kv_splice_ref(
    k: Tensor,
    v: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    table: Tensor | None,
    rows: Tensor | None,
    ordered: bool,
    segments: Tensor,
    stays: Tensor,
    insert_slots: Tensor,
    offsets: Tensor,
    positions: Tensor | None,
    new_positions: Tensor | None,
    inv_freq: Tensor | None,
    interleaved: bool,
    attention_scaling: float,
) -> None:
    """See `op.py` for the flat arguments (those of the torch schema)."""
    device, acc = k.device, accumulate_dtype(k.dtype)
    plan_of_row = torch.zeros(k_new.shape[0], dtype=torch.int64) if rows is None else rows.cpu()
    bounds: list[list[int]] = offsets.tolist()
    for p, (low, high) in enumerate(pairwise(bounds)):
        r = torch.nonzero(plan_of_row == p).flatten().to(device)
        if not r.numel():
            continue
        (s0, t0, i0, o0, n0), (s1, t1, i1, o1, n1) = low, high
        moving = segments[s0:s1] if inv_freq is None else torch.cat((segments[s0:s1], stays[t0:t1]))
        source, destination = (x.to(device) for x in expand_segments(moving))
        inserted = insert_slots[i0:i1].to(device)
        m = inserted.numel()
        keys_new, values_new = k_new[r, :, :m], v_new[r, :, :m]
        delta = torch.zeros_like(source)
        if inv_freq is not None:
            # By slot; without explicit positions (ordered discipline only) an entry's position is its slot.
            before = source if positions is None else positions.to(device)[o0:o1][source]
            after = destination if new_positions is None else new_positions.to(device)[n0:n1][destination]
            fresh = inserted if new_positions is None else new_positions.to(device)[n0:n1][inserted]
            delta = after - before
            touched = (source != destination) | (delta != 0)
            source, destination, delta = source[touched], destination[touched], delta[touched]
            cos, sin = _phases(fresh, inv_freq, r, acc)
            keys_new = (rotate(keys_new, cos, sin, interleaved) * attention_scaling).to(k.dtype)
        at = _index(k, table, r, source)
        keys, values = k[at], v[at]  # [r, Hkv, n, D]
        if inv_freq is not None:
            cos, sin = _phases(delta, inv_freq, r, acc)
            keys = torch.where((delta != 0)[:, None], rotate(keys, cos, sin, interleaved).to(k.dtype), keys)
        at = _index(k, table, r, destination)
        k[at], v[at] = keys, values
        at = _index(k, table, r, inserted)
        k[at], v[at] = keys_new, values_new
