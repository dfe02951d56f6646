"""`fused_linear`: schema, checks, shape function, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import (
    ORACLE_DTYPES,
    check_contiguous_rows,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    describe,
    is_finite,
)
from ..library import define_op, register_autograd
from ..packed_weight import check_packed
from . import cpu as cpu
from . import ref as ref

_ARGS = (
    "Tensor x, Tensor weight, Tensor? packed, Tensor? norm, float eps, Tensor? bias, bool swiglu, Tensor? residual,"
    " str? backend"
)


def _fake(
    x: Tensor, weight: Tensor, packed: Tensor | None, norm: Tensor | None, eps: float, bias: Tensor | None,
    swiglu: bool, residual: Tensor | None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if swiglu else weight.shape[0]))


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, packed: Tensor | None, norm: Tensor | None, eps: float,
    bias: Tensor | None, swiglu: bool, residual: Tensor | None, backend: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    optional = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (norm, bias, residual))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *optional


_op = define_op("fused_linear", f"({_ARGS}) -> Tensor", _fake)
_op_backward = define_op(
    "fused_linear_backward", f"(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_backward
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, norm, eps, bias, swiglu, residual, _ = inputs
    ctx.save_for_backward(x, weight, norm, bias, residual)
    ctx.constants = (eps, swiglu)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, norm, bias, residual = ctx.saved_tensors
    eps, swiglu = ctx.constants
    # By the best that has one, whichever served the forward.
    dx, dw, dn, db, dr = _op_backward(grad, x, weight, None, norm, eps, bias, swiglu, residual, "ref")
    absent = (None if t is None else g for t, g in ((norm, dn), (bias, db), (residual, dr)))
    dn_, db_, dr_ = absent
    return dx, dw, None, dn_, None, db_, None, dr_, None


register_autograd("fused_linear", _backward, _setup_context)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    *,
    packed: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear map with the RMS norm before it and the activation and residual after it, in one read of the weight.

    `qkv(norm(x))`, `x + out(attended)`, `silu(gate(norm(x))) * up(norm(x))`, `x + down(h)` and a logits head are one
    call each. For the handful of rows of a decode step, which is bound by reading weights, and on a CPU for any number.

    Args:
        x: [..., E]; fp32, bf16 or fp16.
        weight: [O, E] as `torch.nn.Linear` holds it, contiguous last dimension; its dtype may differ from x's.
        packed: the weight before it was rounded, in codes of 4 or 8 bits (`mc_kernels.packed_weight`), or None. On a
            CPU a few rows of finite x, as many as make it faster, are multiplied with it, where x and weight are both
            bf16 or both fp32, and the weight is not read. That the values agree is the caller's duty.
        norm: [E] gain of an RMS norm of x, or None for no norm. eps: added to the mean square.
        bias: [O], added to the product.
        swiglu: the O rows are the gate's, then the up projection's: silu(gate) * up.
        residual: [..., M], added last, in x's dtype.
        backend: `ref`, `cpu`, or None for the better that can.

    Returns:
        [..., M] in x's dtype, M = O, or O/2 with swiglu; contiguous, aliasing nothing. fp32 in between, rounded once;
        where x and weight are bf16 and the processor multiplies that, a normed x is rounded too.

    Raises:
        TypeError: dtype or device.
        ValueError: shape, stride or value.
        BackendError: the named backend cannot serve.

    Gradients flow to all tensors (once: no second derivative).
    """
    check_tensor("x", x, ORACLE_DTYPES)
    check_tensor("weight", weight, ORACLE_DTYPES)
    if x.dim() == 0:
        raise ValueError(f"x: expected shape [..., E], got {describe(x)}")
    inputs, outputs = x.shape[-1], weight.shape[0] if weight.dim() else 0
    check_shape("weight", weight, (None, inputs), {})
    check_contiguous_rows("weight", weight)
    if packed is not None:
        check_packed(packed, weight, swiglu=swiglu)
    if norm is not None:
        check_tensor("norm", norm, ORACLE_DTYPES)
        check_shape("norm", norm, (inputs,), {})
        if not (is_finite(eps) and eps >= 0):
            raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")
    if bias is not None:
        check_tensor("bias", bias, ORACLE_DTYPES)
        check_shape("bias", bias, (outputs,), {})
    if swiglu:
        if outputs % 2:
            raise ValueError(f"weight: expected an even number of rows with swiglu, got {outputs}")
        outputs //= 2
    if residual is not None:
        check_tensor("residual", residual, ORACLE_DTYPES)
        check_shape("residual", residual, (*x.shape[:-1], outputs), {})
        check_same_dtype(("x", x), residual=residual)
    check_same_device(("x", x), weight=weight, norm=norm, bias=bias, residual=residual)
    return _op(x, weight, packed, norm, eps, bias, swiglu, residual, backend)
