"""`kv_splice_` on a CPU: csrc/kv_splice/cpu.cpp, in place and in one pass, on the threads that torch is set to use."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..registry import register


def _supports(k: Tensor, *_: object) -> str | None:
    if k.device.type != "cpu":
        return f"expected CPU tensors, got {k.device}"
    return "fp64 is for the oracle" if k.dtype == torch.float64 else None


@register("kv_splice_", "cpu", available=native.available, supports=_supports)
def kv_splice_cpu(
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
    """See `op.py` for the flat arguments, `ref.py` for what they mean."""
    # Held in names: the library gets addresses.
    arrays = [
        native.array(x, torch.int64) for x in (offsets, rows, segments, stays, insert_slots, positions, new_positions)
    ]
    freq = native.array(inv_freq, torch.float64)
    native.library().kv_splice(
        k,
        v,
        k_new,
        v_new,
        table,
        offsets.shape[0] - 1,
        *(native.address(x) for x in arrays),
        0 if freq is None else 1 if freq.dim() == 1 else freq.shape[0],
        native.address(freq),
        0 if freq is None else freq.shape[-1],
        interleaved,
        attention_scaling,
        torch.get_num_threads(),
    )
