"""`kv_splice_` on a GPU by csrc/kv_splice/cuda.cu: one launch, the plan in its arguments; see kernel.cuh there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import cuda_backend, native


def _int64(x: Tensor | None, device: torch.device) -> Tensor | None:
    if x is None or (x.dtype is torch.int64 and x.device == device and x.is_contiguous()):
        return x
    return x.to(device, torch.int64).contiguous()


def _call(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, table: Tensor | None, rows: Tensor | None, segments: Tensor,
    stays: Tensor, insert_slots: Tensor, offsets: Tensor, positions: Tensor | None, new_positions: Tensor | None,
    inv_freq: Tensor | None, interleaved: bool, attention_scaling: float,
) -> Callable[[Any], int]:  # fmt: skip
    """The library's call but for its last argument; keeps what it reads."""
    plan = [native.array(x, torch.int64) for x in (offsets, rows, segments, stays, insert_slots)]
    by_slot = [_int64(x, k.device) for x in (positions, new_positions)]
    freq = cuda_backend.frequencies(inv_freq)
    arguments = (
        *(native.view(x) for x in (k, v, k_new, v_new)),
        None if table is None else native.view(table),
        offsets.shape[0] - 1,
        *(native.address(x) for x in plan),
        *(native.address(x) for x in by_slot),
        0 if freq is None else 1 if freq.dim() == 1 else freq.shape[0],
        native.address(freq),
        0 if freq is None else freq.shape[-1],
        interleaved,
        attention_scaling,
    )
    held = (*plan, *by_slot, freq)  # the library gets addresses

    def call(where: Any, held: object = held) -> int:
        return int(cuda_backend.library().kv_splice(*arguments, where))

    return call


def kv_splice_workspace(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, table: Tensor | None, rows: Tensor | None, ordered: bool,
    segments: Tensor, stays: Tensor, insert_slots: Tensor, offsets: Tensor, positions: Tensor | None,
    new_positions: Tensor | None, inv_freq: Tensor | None, interleaved: bool, attention_scaling: float,
) -> int:  # fmt: skip
    """Bytes of workspace that a call with these arguments needs: 0 for plans of up to some dozen edits."""
    call = _call(
        k, v, k_new, v_new, table, rows, segments, stays, insert_slots, offsets, positions, new_positions, inv_freq,
        interleaved, attention_scaling,
    )  # fmt: skip
    return cuda_backend.workspace_bytes(call, k)


def kv_splice_cuda(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, table: Tensor | None, rows: Tensor | None, ordered: bool,
    segments: Tensor, stays: Tensor, insert_slots: Tensor, offsets: Tensor, positions: Tensor | None,
    new_positions: Tensor | None, inv_freq: Tensor | None, interleaved: bool, attention_scaling: float,
    *, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """Splice on the current stream. See `op.py` for the flat arguments (k and v have their layer dimension, the plan is
    on the CPU), `ref.py` for what they mean.

    workspace: uint8 on k's device, `kv_splice_workspace(...)` bytes. With it, with positions on k's device and with an
    fp64 `inv_freq`, nothing is allocated. The call can be captured in a CUDA graph; a replay splices by the same plan.
    """
    call = _call(
        k, v, k_new, v_new, table, rows, segments, stays, insert_slots, offsets, positions, new_positions, inv_freq,
        interleaved, attention_scaling,
    )  # fmt: skip
    kind = "kv_splice", *(x.shape[0] for x in (offsets, segments, stays, insert_slots)), ordered, inv_freq is None
    cuda_backend.launch(call, k, workspace, kind)
