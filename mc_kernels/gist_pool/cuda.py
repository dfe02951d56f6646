"""`gist_pool` and `collapse_` on a GPU by csrc/gist_pool/cuda.cu, one launch each; see kernel.cuh there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import cuda_backend, native


def _rows(*weights: Tensor) -> list[Tensor]:
    """Weights as the library takes them: their last dimension is contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in weights]


def gist_pool_cuda(
    k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `ref.gist_pool_ref`. Sums are fp32, whatever the inputs.

    out: k_gist and v_gist to write, [R, Hkv, N, G, D] in k's dtype, their last dimension contiguous, apart from each
        other and from what is read. With it, and with weights whose last dimension is contiguous, nothing is allocated.
    """
    shape = (*k.shape[:3], w.shape[2], k.shape[4])
    k_gist, v_gist = out or (k.new_empty(shape), k.new_empty(shape))
    held = [k, v, *_rows(w, b, m, c), k_gist, v_gist]  # the library gets addresses
    with cuda_backend.on_device_of(k):
        cuda_backend.library().gist_pool(*(native.view(x) for x in held), cuda_backend.current_stream(k))
    return k_gist, v_gist


def _collapse(
    k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor, children: Tensor, slots: Tensor, moves: Tensor
) -> Callable[[Any], int]:
    """The library's call but for its last argument; keeps what it reads."""
    held = [k, v, *_rows(w, b, m, c)]
    plan: list[Any] = [native.array(x, torch.int64) for x in (children, slots, moves)]
    arguments = (
        *(native.view(x) for x in held),
        plan[0].shape[0],
        native.address(plan[0]),
        native.address(plan[1]),
        plan[2].shape[0],
        native.address(plan[2]),
    )

    def call(where: Any, held: object = (held, plan)) -> int:
        return int(cuda_backend.library().collapse(*arguments, where))

    return call


def collapse_workspace(
    k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor, children: Tensor, slots: Tensor, moves: Tensor
) -> int:
    """Bytes of workspace that a call with these arguments needs: 0 for some dozen blocks."""
    return cuda_backend.workspace_bytes(_collapse(k, v, w, b, m, c, children, slots, moves), k)


def collapse_cuda(
    k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor, children: Tensor, slots: Tensor, moves: Tensor,
    *, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """See `collapse.py` for the arguments, `collapse_ref.py` for what they mean. On the current stream; the call can be
    captured in a CUDA graph, and a replay collapses the same slots.

    workspace: uint8 on k's device, `collapse_workspace(...)` bytes. With it, and with weights whose last dimension is
        contiguous, nothing is allocated.
    """
    kind = "collapse", k.shape, k.dtype, children.shape, moves.shape, k.device
    cuda_backend.launch(_collapse(k, v, w, b, m, c, children, slots, moves), k, workspace, kind)
