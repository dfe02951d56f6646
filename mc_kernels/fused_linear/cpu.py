"""`fused_linear` on a CPU: csrc/fused_linear, one stream over the weight for a few rows, matrix products for many."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import native
from ..packed_weight import packed_bits
from ..registry import register


def _supports(
    x: Tensor, weight: Tensor, packed: Tensor | None, norm: Tensor | None, eps: float, bias: Tensor | None,
    swiglu: bool, residual: Tensor | None,
) -> str | None:  # fmt: skip
    if x.device.type != "cpu":
        return f"expected CPU tensors, got {x.device}"
    for t in (x, weight, norm, bias):
        if t is not None and t.dtype == torch.float64:
            return "fp64 is for the oracle"
    return None


@register("fused_linear", "cpu", available=native.available, supports=_supports)
def fused_linear_cpu(
    x: Tensor, weight: Tensor, packed: Tensor | None, norm: Tensor | None, eps: float, bias: Tensor | None,
    swiglu: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `ref.fused_linear_ref`."""
    *outer, inputs = x.shape
    outputs, rows = weight.shape[0] // 2 if swiglu else weight.shape[0], math.prod(outer)
    out = torch.empty((*outer, outputs), dtype=x.dtype)
    # Held in names: the library gets addresses.
    x, kept = x.contiguous(), [None if t is None else t.contiguous() for t in (norm, bias, residual)]
    norm, bias, residual = kept
    dtype = native.dtype_code(out.dtype)
    native.library().fused_linear(
        (x.data_ptr(), dtype, (rows, inputs), (inputs, 1)),
        weight,
        norm,
        eps,
        bias,
        swiglu,
        None if residual is None else (residual.data_ptr(), dtype, (rows, outputs), (outputs, 1)),
        (out.data_ptr(), dtype, (rows, outputs), (outputs, 1)),
        torch.get_num_threads(),
        None if packed is None else (packed.data_ptr(), packed_bits(packed)),
    )
    return out
