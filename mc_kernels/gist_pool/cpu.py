"""`gist_pool` and `collapse_` on a CPU: csrc/gist_pool/cpu.cpp, one read of each block, on as many threads as torch
uses."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..registry import register
from .ref import gist_pool_backward_ref


def _supports(k: Tensor, v: Tensor, w: Tensor, *_: object) -> str | None:
    if k.device.type != "cpu":
        return f"expected CPU tensors, got {k.device}"
    return "fp64 is for the oracle" if torch.float64 in (k.dtype, w.dtype) else None


def _views(*weights: Tensor) -> list[Tensor]:
    """Weights as the library takes them: their last dimension is contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in weights]


@register("gist_pool", "cpu", available=native.available, supports=_supports)
def gist_pool_cpu(k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """See `ref.gist_pool_ref`. Sums are fp32, whatever the inputs; with bf16 data and weights, on a processor that
    multiplies bf16, p and what meets M are rounded to it."""
    r, h, n, _, d = k.shape
    shape = (r, h, n, w.shape[2], d)
    k_gist, v_gist = torch.empty(shape, dtype=k.dtype), torch.empty(shape, dtype=k.dtype)
    native.library().gist_pool(k, v, *_views(w, b, m, c), k_gist, v_gist, torch.get_num_threads())
    return k_gist, v_gist


# Training multiplies large batches: PyTorch's matrix products serve.
register("gist_pool_backward", "cpu")(gist_pool_backward_ref)


@register("collapse_", "cpu", available=native.available, supports=_supports)
def collapse_cpu(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    children: Tensor,
    slots: Tensor,
    moves: Tensor,
) -> None:
    """See `collapse.py` for the arguments, `collapse_ref.py` for what they mean."""
    arrays = [x.contiguous() for x in (children, slots, moves)]  # the library gets addresses
    native.library().collapse(
        k,
        v,
        *_views(w, b, m, c),
        arrays[0].shape[0],
        native.address(arrays[0]),
        native.address(arrays[1]),
        arrays[2].shape[0],
        native.address(arrays[2]),
        torch.get_num_threads(),
    )
