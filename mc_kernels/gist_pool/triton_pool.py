# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What the Triton kernels of `gist_pool`, its backward and `collapse_` share: the pooling of a tile of blocks, and
the linear residual of a tile of gists; what their host code does alike.

A tile is the work of one program: some blocks of one row and head, and their gists as the rows [ROWS, D] of a key and a
value matrix in registers. K and D are padded to powers of two by masks; padded entries and dimensions are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_backend import interpreted
from ..triton_math import exp_of_nonpositive
from ..triton_report import Compilation

RMS_EPS = tl.constexpr(1e-12)  # as ref.RMS_EPS


@triton.jit
def load_block(ptr, at, inside, dims, D: tl.constexpr):
    """Entries that start at `ptr + at` [KP], as fp32 [KP, DP]."""
    return tl.load(ptr + at[:, None] + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def load_head(w_ptr, b_ptr, gist, inside, entries, dims, D: tl.constexpr, K: tl.constexpr):
    """One gist's w, split into key and value [DP], and b [KP], as fp32."""
    wk = tl.load(w_ptr + gist * 2 * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    wv = tl.load(w_ptr + gist * 2 * D + D + dims, mask=dims < D, other=0.0).to(tl.float32)
    return wk, wv, tl.load(b_ptr + gist * K + entries, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(k, v, D: tl.constexpr):
    """1 / rms of each entry's [key; value] [KP]. Rounded correctly: there are only K of them a block."""
    mean = (tl.sum(k * k, axis=1) + tl.sum(v * v, axis=1)) / (2 * D)
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(mean + RMS_EPS))


@triton.jit
def attend(k, v, inv_rms, wk, wv, b, inside, EXACT: tl.constexpr):
    """n . w and p, [KP] each. EXACT: exp and quotient to fp32 rounding, for which the backward of halves lacks
    registers: what rounds at 2^-22 there is nothing beside a half, but the most of the error of fp32's gradients."""
    nw = tl.sum(k * wk[None, :] + v * wv[None, :], axis=1) * inv_rms
    logits = tl.where(inside, nw + b, float("-inf"))
    logits -= tl.max(logits, axis=0)
    if EXACT:
        weights = exp_of_nonpositive(logits)
        return nw, tl.math.div_rn(weights, tl.sum(weights, axis=0))
    weights = tl.exp(logits)
    return nw, weights / tl.sum(weights, axis=0)


@triton.jit
def pool_tile(
    k_ptr, v_ptr, children_ptr, k_block, k_entry, v_block, v_entry, first, count, w_ptr, b_ptr,
    K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Pooled keys and values y of blocks first .. first + count - 1, [ROWS, DP] fp32 each; row i * G + g is gist g of
    the i-th. Entry j of a block lies at block * k_block + j * k_entry, or with children at children[block, j]
    * k_entry. While one block is reduced, the next ones are on their way to shared memory."""
    entries, dims, rows = tl.arange(0, KP), tl.arange(0, DP), tl.arange(0, ROWS)
    inside = entries < K
    yk, yv = tl.zeros((ROWS, DP), tl.float32), tl.zeros((ROWS, DP), tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        block = tl.cast(first + i, tl.int64)
        if children_ptr is None:
            k_at, v_at = block * k_block + entries * k_entry, block * v_block + entries * v_entry
        else:
            child = tl.load(children_ptr + block * K + entries, mask=inside, other=0).to(tl.int64)
            k_at, v_at = child * k_entry, child * v_entry
        k, v = load_block(k_ptr, k_at, inside, dims, D), load_block(v_ptr, v_at, inside, dims, D)
        inv_rms = inverse_rms(k, v, D)
        for g in range(G):
            wk, wv, b = load_head(w_ptr, b_ptr, g, inside, entries, dims, D, K)
            _, p = attend(k, v, inv_rms, wk, wv, b, inside, True)
            here = rows[:, None] == i * G + g
            yk = tl.where(here, tl.sum(p[:, None] * k, axis=0)[None, :], yk)
            yv = tl.where(here, tl.sum(p[:, None] * v, axis=0)[None, :], yv)
    return yk, yv


@triton.jit
def add_residual(
    yk, yv, yk_ptr, yv_ptr, n_rows, m_ptr, c_ptr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y + y M + c. A matrix product needs slices of y, which registers cannot give: y goes through the program's own
    rows of `yk_ptr`, `yv_ptr` [n_rows, D], that is through the first-level cache, in their dtype. These rows are free
    again afterwards; the barriers order the program's threads.

    In fp32 y and c come last: a product is one chain of additions, and begun with y each of its 2D would round at the
    size of y, which M's part is a small correction of."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DP)
    here = (rows < n_rows)[:, None]
    tl.store(yk_ptr + rows[:, None] * D + dims[None, :], yk, mask=here & (dims < D)[None, :])
    tl.store(yv_ptr + rows[:, None] * D + dims[None, :], yv, mask=here & (dims < D)[None, :])
    tl.debug_barrier()
    if PRECISION == "ieee":
        yk, yv = tl.zeros((ROWS, DP), tl.float32), tl.zeros((ROWS, DP), tl.float32)
    else:
        yk += tl.load(c_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
        yv += tl.load(c_ptr + D + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
    for start in range(0, D, INNER):
        i = start + tl.arange(0, INNER)
        a_at, a_mask = rows[:, None] * D + i[None, :], here & (i < D)[None, :]
        m_at, m_mask = i[:, None] * 2 * D + dims[None, :], (i < D)[:, None] & (dims < D)[None, :]
        ak = tl.load(yk_ptr + a_at, mask=a_mask, other=0.0).to(PRODUCT)
        av = tl.load(yv_ptr + a_at, mask=a_mask, other=0.0).to(PRODUCT)
        kk = tl.load(m_ptr + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        kv = tl.load(m_ptr + D + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        vk = tl.load(m_ptr + 2 * D * D + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        vv = tl.load(m_ptr + 2 * D * D + D + m_at, mask=m_mask, other=0.0).to(PRODUCT)
        yk = tl.dot(ak, kk, yk, input_precision=PRECISION)
        yv = tl.dot(ak, kv, yv, input_precision=PRECISION)
        yk = tl.dot(av, vk, yk, input_precision=PRECISION)
        yv = tl.dot(av, vv, yv, input_precision=PRECISION)
    if PRECISION == "ieee":
        at, mask = rows[:, None] * D + dims[None, :], here & (dims < D)[None, :]
        yk += tl.load(c_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
        yk += tl.load(yk_ptr + at, mask=mask, other=0.0)
        yv += tl.load(c_ptr + D + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
        yv += tl.load(yv_ptr + at, mask=mask, other=0.0)
    tl.debug_barrier()
    return yk, yv


def operand(product: torch.dtype) -> tl.dtype:
    """What a kernel hands to `tl.dot`. The interpreter multiplies the bit patterns of bf16
    (triton-lang/triton issue 11584): there the rounded operands are widened, which changes nothing else."""
    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return names[torch.float32 if interpreted() else product]


def compilation(
    shape: str, kernel: Any, pointers: dict[str, str], strides: Sequence[str], counts: Sequence[str],
    constexprs: dict[str, Any], warps: int,
) -> Compilation:  # fmt: skip
    """One specialisation for `triton_report.py`. pointers: their types; strides: multiples of 16, as models have them;
    a pointer among the constexprs is one that is not given."""
    signature = pointers | dict.fromkeys((*strides, *counts), "i32") | dict.fromkeys(constexprs, "constexpr")
    aligned = [x for x in (*pointers, *strides) if x not in constexprs]
    return Compilation(shape, kernel, signature, constexprs, warps, aligned=aligned)


def scratch(workspace: Tensor | None, n_bytes: int, like: Tensor) -> Tensor:
    """`n_bytes` bytes on like's device: the caller's, or new ones."""
    if workspace is None:
        return torch.empty(n_bytes, dtype=torch.uint8, device=like.device)
    if workspace.dtype != torch.uint8 or workspace.device != like.device or workspace.numel() < n_bytes:
        raise ValueError(
            f"workspace: expected at least {n_bytes} bytes (uint8) on {like.device}, got {workspace.dtype} of "
            f"{workspace.numel()} on {workspace.device}"
        )
    return workspace


def check_out(name: str, out: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result's memory as given by the caller."""
    if out.dtype != like.dtype or out.device != like.device or out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {like.dtype} of shape {list(shape)} on {like.device}, got {out.dtype} of "
            f"shape {list(out.shape)}, strides {list(out.stride())} on {out.device}"
        )
    return out
