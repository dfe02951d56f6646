"""`lens_score` on a GPU by csrc/lens_score/cuda.cu: one persistent launch; see kernel.cuh there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import cuda_backend, native


def _rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, a copy only where it has none."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _call(out: Tensor, *args: Any) -> Callable[[Any], int]:
    """The library's call but for its last argument; keeps what it reads."""
    *tensors, legal, n_heads = args
    held = [*tensors[:3], *(_rows(x) for x in tensors[3:])]
    mask = None if legal is None else legal.contiguous()
    views = [native.view(x) for x in held]
    arguments = (*views[:3], tuple(views[3:]), n_heads, native.address(mask), native.view(out))

    def call(where: Any, held: object = (held, mask, out)) -> int:
        return int(cuda_backend.library().lens_score(*arguments, where))

    return call


def lens_score_workspace(*args: Any) -> int:
    """Bytes of workspace that a call with these arguments, those of `ref.lens_score_ref`, needs."""
    out = args[0].new_empty(args[0].shape[0], 2, dtype=torch.float32)
    return cuda_backend.workspace_bytes(_call(out, *args), args[0])


def lens_score_cuda(*args: Any, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
    """See `ref.lens_score_ref` for the arguments. Sums are fp32. What entries are multiplied with is rounded to their
    dtype where the weights have it too, and is fp32 otherwise. On the current stream; can be captured in a CUDA graph.

    out: fp32 [N, 2] to write, apart from what is read. workspace: uint8 on entries' device,
        `lens_score_workspace(...)` bytes. With both, a contiguous `legal` and weights whose last dimension is
        contiguous, nothing is allocated.
    """
    entries = args[0]
    if out is None:
        out = entries.new_empty(entries.shape[0], 2, dtype=torch.float32)
    kind = "lens_score", *(x.shape for x in args[:3]), entries.dtype, args[-1], entries.device
    cuda_backend.launch(_call(out, *args), entries, workspace, kind)
    return out
