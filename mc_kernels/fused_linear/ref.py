"""Oracle of `fused_linear`: a linear map with what a decoder layer does before and after it.

    n = x, or with a norm x / sqrt(mean(x^2) + eps) * norm over the last dimension
    y = n W^T + bias
    out = y, or with swiglu silu(y[..., :O/2]) * y[..., O/2:]; then + residual

x [..., E], weight [O, E], norm [E], bias [O], residual [..., M] -> [..., M] with M = O, or O/2 with swiglu, in x's
dtype. Accumulates in fp32 (fp64 if x or the weight are) and rounds once. Empty sizes give empty outputs; with E = 0 the
map gives its bias. Nothing aliases the inputs. `packed` is the weight once more (`mc_kernels.packed_weight`), which is
not read here. RMS norm: Zhang and Sennrich 2019; SwiGLU: Shazeer 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulate_dtype
from ..library import differentiate
from ..registry import register


@register("fused_linear", "ref")
def fused_linear_ref(
    x: Tensor, weight: Tensor, packed: Tensor | None, norm: Tensor | None, eps: float, bias: Tensor | None,
    swiglu: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    acc = torch.promote_types(accumulate_dtype(x.dtype), accumulate_dtype(weight.dtype))
    n = x.to(acc)
    if norm is not None:
        n = n / (n.square().mean(-1, keepdim=True) + eps).sqrt() * norm.to(acc)
    y = F.linear(n, weight.to(acc), None if bias is None else bias.to(acc))
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.to(acc)
    return y.to(x.dtype)


@register("fused_linear_backward", "ref")
def fused_linear_backward_ref(
    grad: Tensor, x: Tensor, weight: Tensor, packed: Tensor | None, norm: Tensor | None, eps: float,
    bias: Tensor | None, swiglu: bool, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weight, norm, bias and residual in their dtypes, [0] for those that are absent: recomputes the
    forward and differentiates it."""
    optional = (norm, bias, residual)
    given = [t for t in optional if t is not None]

    def forward(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        values = iter(rest)
        norm_, bias_, residual_ = (None if t is None else next(values) for t in optional)
        return fused_linear_ref(x, weight, None, norm_, eps, bias_, swiglu, residual_)

    dx, dw, *others = differentiate(forward, [x, weight, *given], [grad])
    left = iter(others)
    return (dx, dw, *(x.new_empty(0) if t is None else next(left) for t in optional))
