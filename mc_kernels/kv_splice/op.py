"""`kv_splice_`: schema, checks, shape function. In place, no autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import cuda_backend
from ..library import define_op
from ..rope import RopeSpec
from ..splice_checks import plan_offsets
from ..triton_backend import refuse_device, refuse_fp64, register_triton
from . import cpu as cpu
from . import ref as ref
from .checks import check_cache, check_pages, check_plans, check_positions, check_rope, movable
from .plan import PageTable, SplicePlan

_SCHEMA = (
    "(Tensor(a!) k, Tensor(b!) v, Tensor k_new, Tensor v_new, Tensor? table, Tensor? rows, bool ordered,"
    " Tensor segments, Tensor stays, Tensor insert_slots, Tensor offsets, Tensor? positions, Tensor? new_positions,"
    " Tensor? inv_freq, bool interleaved, float attention_scaling, str? backend) -> ()"
)


def _fake(*_: object) -> None:
    return None


_op = define_op("kv_splice_", _SCHEMA, _fake)


def _triton_supports(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, table: Tensor | None, *rest: object
) -> str | None:
    """The plan stays on the CPU and `inv_freq` may be fp64, so not `refuse`."""
    return refuse_device((k, v, k_new, v_new, table)) or refuse_fp64((k,))


def _cuda_supports(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, table: Tensor | None, *rest: object
) -> str | None:
    return cuda_backend.refuse_device((k, v, k_new, v_new, table)) or refuse_fp64((k,))


register_triton("kv_splice_", "mc_kernels.kv_splice.triton_kernel", "kv_splice_triton", _triton_supports)
cuda_backend.register_cuda("kv_splice_", "mc_kernels.kv_splice.cuda", "kv_splice_cuda", _cuda_supports)


class PackedPlans(NamedTuple):
    """The plans of a call as the op takes them: int64 tensors on the CPU, plan after plan.

    segments, stays: [n, 3] (source, destination, count), see `SplicePlan`.
    insert_slots: [sum of M].
    offsets: [P+1, 5], see `splice_checks.plan_offsets`.
    """

    segments: Tensor
    stays: Tensor
    insert_slots: Tensor
    offsets: Tensor


def pack_plans(plans: Sequence[SplicePlan]) -> PackedPlans:
    """Concatenate the plans' arrays; the arrays of a single plan are passed as they are."""
    if len(plans) == 1:
        return PackedPlans(plans[0].segments, plans[0].stays, plans[0].insert_slots, plans[0].offsets)
    # A third of the time of torch.tensor.
    offsets = torch.from_numpy(np.array(plan_offsets(plans), dtype=np.int64))
    segments, stays = torch.cat([p.segments for p in plans]), torch.cat([p.stays for p in plans])
    return PackedPlans(segments, stays, torch.cat([p.insert_slots for p in plans]), offsets)


def _by_slot(given: Tensor | Sequence[Tensor] | None, maps: Sequence[Tensor]) -> Tensor:
    """Positions by slot, concatenated over plans; an entry's rank where none are given (maps: rank to slot)."""
    if given is not None:
        return given if isinstance(given, Tensor) else torch.cat(tuple(given))
    parts = []
    for slots in maps:
        ranks = torch.empty_like(slots)
        ranks[slots] = torch.arange(slots.shape[0], device=slots.device)
        parts.append(ranks)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def kv_splice_(
    k: Tensor,
    v: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    plan: SplicePlan | Sequence[SplicePlan],
    rope: RopeSpec | None = None,
    *,
    rows: Tensor | Sequence[int] | None = None,
    positions: Tensor | Sequence[Tensor] | None = None,
    new_positions: Tensor | Sequence[Tensor] | None = None,
    pages: PageTable | None = None,
    backend: str | None = None,
) -> None:
    """Splice a KV cache in place: remove, insert and move entries in one call for all layers and sequences.

    Args:
        k, v: [R, Hkv, S, D] (R = layers x batch) or [L, B, Hkv, S, D] (R = L * B, row r = layer * B + b), fp32, bf16
            or fp16, any strides with a contiguous last dimension; both may be views of one allocation. With `pages`:
            [L, P, Hkv, page_size, D] or, for L = 1, [P, Hkv, page_size, D]. Written. Or float8_e4m3fn, with even D and
            strides and without `rope`: bytes are moved, and the scales of old and new entries are one.
        k_new, v_new: [R, Hkv, M, D] inserted entries of all edits in timeline order, keys unrotated. With several
            plans M is at least the largest of them and what lies beyond a row's own plan is not read.
        plan: what to do, or several plans (of one discipline) with `rows`.
        rope: keys are stored rotated: every survivor whose position changes is re-rotated by
            new_positions[destination] - positions[source], moved or not (bits are kept where that is zero), and
            inserted keys are rotated at their new position, times `attention_scaling`. `inv_freq` [D_rot/2] or
            [R, D_rot/2]. None: keys are stored unrotated, or keep the rotation they have.
        rows: [R] index of each row's plan, -1 for a row that is left alone. None: one plan for all rows.
        positions, new_positions: int64 >= 0 by *slot*, [length] before and [new_length] after (with several plans:
            one tensor a plan), on the CPU or the cache's device. Default: the rank of the entry. Only with `rope`.
        pages: the page table of a paged cache. A page that is written must not be used twice.
        backend: `ref`, `cpu`, `triton`, `cuda`, or None for the best that can.

    Aliasing: k, v, k_new and v_new must not share memory with each other (k_new with v_new may); interleaved views of
    one allocation do not. Slots outside [0, length) are not read, slots outside [0, new_length) not written.
    Empty plans, caches and batches are legal and do nothing.

    Raises:
        TypeError: dtype or device.
        ValueError: shape, stride, value or aliasing.
        BackendError: the named backend cannot serve.

    All before anything is written. Under `torch.compile` what needs values or addresses (positions, pages, aliasing)
    is not checked, and while a CUDA graph is captured values that lie on the GPU are not. Otherwise positions and a
    page table on a GPU are read back for the checks: the call waits for what the GPU has under way.

    Under `torch.compile`, torch 2.13 keeps the offsets of the first call where k and v are interleaved views of one
    allocation whose offset changes between calls (some of its layers): pass the whole cache, or separate allocations.

    Not differentiable: with gradients enabled, tensors that require them are refused.
    Source: RoFormer (Su et al. 2021); re-rotation composes because rotations by p and d multiply to one by p + d.
    """
    plans = tuple(plan) if not isinstance(plan, SplicePlan) and isinstance(plan, Sequence) else (plan,)
    kk, vv, n_rows, n_slots = check_cache(k, v, k_new, v_new, pages)
    row_plans = check_plans(plans, rows, n_rows, n_slots, k_new.shape[2])
    check_positions("positions", positions, rope, [p.length for p in plans], k.device)
    check_positions("new_positions", new_positions, rope, [p.new_length for p in plans], k.device)
    inv_freq, interleaved, scaling = check_rope(rope, n_rows, k)
    ordered = plans[0].discipline == "ordered"
    before: Tensor | None = None
    after: Tensor | None = None
    if rope is not None and not (ordered and positions is None and new_positions is None):
        before = _by_slot(positions, [p.slots for p in plans])
        after = _by_slot(new_positions, [p.new_slots for p in plans])
    if pages is not None:
        check_pages(pages, kk, plans, row_plans, before, after)
    packed = pack_plans(plans)
    _op(
        *movable(kk, vv, k_new, v_new), None if pages is None else pages.table, row_plans, ordered, packed.segments,
        packed.stays, packed.insert_slots, packed.offsets, before, after, inv_freq, interleaved, scaling, backend,
    )  # fmt: skip
    if not torch.compiler.is_compiling() and not k.is_inference():
        torch.autograd.graph.increment_version((k, v))
