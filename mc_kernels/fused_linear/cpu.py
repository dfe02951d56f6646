"""`fused_linear` on a CPU: csrc/fused_linear/cpu.cpp, one stream over the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..registry import register


def _supports(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    if x.device.type != "cpu":
        return f"expected CPU tensors, got {x.device}"
    tensors = (x, weight, *(t for t in rest if isinstance(t, Tensor)))
    return "fp64 is for the oracle" if any(t.dtype == torch.float64 for t in tensors) else None


def _rows(x: Tensor | None) -> native.View | None:
    """[..., E] as [N, E]; the caller keeps `x`, which is contiguous."""
    if x is None:
        return None
    width = x.shape[-1]
    address, dtype, _, _ = native.view(x)
    return address, dtype, (x.numel() // width if width else x.shape[:-1].numel(), width), (width, 1)


@register("fused_linear", "cpu", available=native.available, supports=_supports)
def fused_linear_cpu(
    x: Tensor, weight: Tensor, norm: Tensor | None, eps: float, bias: Tensor | None, swiglu: bool,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `ref.fused_linear_ref`."""
    out = torch.empty((*x.shape[:-1], weight.shape[0] // 2 if swiglu else weight.shape[0]), dtype=x.dtype)
    # Held in names: the library gets addresses.
    given = x.contiguous()
    gain, offset, rest = (None if t is None else t.contiguous() for t in (norm, bias, residual))
    native.library().fused_linear(
        _rows(given),
        native.view(weight),
        None if gain is None else native.view(gain),
        eps,
        None if offset is None else native.view(offset),
        swiglu,
        _rows(rest),
        _rows(out),
        torch.get_num_threads(),
    )
    return out
