"""`fused_linear` on arrays of any kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from .. import extension
from ..contracts import check_contiguous_rows, check_same_dtype, check_shape, describe
from ..extension import View
from .views import FLOATS, Array, array, empty, hand_over


def _contiguous(x: Array) -> Array:
    """`x` in C order, a copy only where it is not."""
    strides = tuple(math.prod(x.shape[i + 1 :]) for i in range(x.dim()))
    if not x.numel() or all(n < 2 or s == want for n, s, want in zip(x.shape, x.strides, strides, strict=True)):
        return x
    copy = np.ascontiguousarray(x.numpy())
    return replace(x, address=copy.ctypes.data, strides=strides, held=copy)


def _rows(x: Array, rows: int) -> View:
    """A contiguous [..., n] as the library's [rows, n]."""
    return x.address, extension.dtype_code(x.dtype), (rows, x.shape[-1]), (x.shape[-1], 1)


def fused_linear(
    x: Any,
    weight: Any,
    *,
    norm: Any = None,
    eps: float = 1e-5,
    bias: Any = None,
    swiglu: bool = False,
    residual: Any = None,
    n_threads: int = 0,
) -> Any:
    """A linear map with the RMS norm before it and the activation and residual after it, in one read of the weight:
    `mc_kernels.fused_linear` on arrays, the same bits.

    Args:
        x: [..., E]; fp32, bf16 or fp16; any strides >= 0 (copied where it is not in C order).
        weight: [O, E], last dimension contiguous, read where it lies; its dtype may differ from x's.
        norm: [E] gain of an RMS norm of x, or None for no norm. eps: added to the mean square.
        bias: [O], added to the product.
        swiglu: the O rows are the gate's, then the up projection's: silu(gate) * up.
        residual: [..., M], added last, in x's dtype; as x.
        n_threads: as for `kv_splice_`.

    Returns:
        [..., M] in x's dtype, M = O, or O/2 with swiglu; a fresh array of x's kind.

    Raises TypeError, ValueError or RuntimeError as `kv_splice_` does.
    """
    given, w = array("x", x, FLOATS), array("weight", weight, FLOATS)
    if given.dim() == 0:
        raise ValueError(f"x: expected shape [..., E], got {describe(given)}")
    inputs, outer = given.shape[-1], given.shape[:-1]
    check_shape("weight", w, (None, inputs), {})
    check_contiguous_rows("weight", w)
    outputs = w.shape[0]
    gain, offset = (None if v is None else array(name, v, FLOATS) for name, v in (("norm", norm), ("bias", bias)))
    if gain is not None:
        check_shape("norm", gain, (inputs,), {})
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")
    if offset is not None:
        check_shape("bias", offset, (outputs,), {})
    if swiglu:
        if outputs % 2:
            raise ValueError(f"weight: expected an even number of rows with swiglu, got {outputs}")
        outputs //= 2
    added = None
    if residual is not None:
        added = array("residual", residual, FLOATS)
        check_shape("residual", added, (*outer, outputs), {})
        check_same_dtype(("x", given), residual=added)
    out = empty((*outer, outputs), given.dtype, given)
    gain, offset, added = (None if v is None else _contiguous(v) for v in (gain, offset, added))
    source = _contiguous(given)  # held in a name, as the others: the library gets addresses
    rows = math.prod(outer)
    extension.library().fused_linear(
        _rows(source, rows),
        w.view(),
        None if gain is None else gain.view(),
        eps,
        None if offset is None else offset.view(),
        bool(swiglu),
        None if added is None else _rows(added, rows),
        _rows(out, rows),
        n_threads,
    )
    return hand_over(out)
