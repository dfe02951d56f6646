"""Backward of `lens_score` in Triton: what streams over the entries; around it `ref`'s formula under torch's autograd.

The formula reads the entries in two ways, y = u V^T (products) and c = W^T u (sums), u_n = x_n / rms(x_n). Both, and
their derivatives, are one stream each, and one more gives the entries' gradient for all of them together:

    dV = dY^T u,  dW = u dC^T                                      sums and products again
    dL/du_n = sum over all products of dY[n] V + over all sums of W[n] dC =: sum_c R[c, n] V_c
    dL/dx_n = (dL/du_n - u_n (u_n . dL/du_n) / E) / rms(x_n)
    u_n . dL/du_n = sum over products of dY[n] . Y[n] + over sums of W[n] . dW[n]          known without another stream

The forward is recomputed, nothing N x E is kept: 4 P + 3 streams over the entries. Everything else is N x (H Q) or the
queries' side, dozens of small torch operations. Operands are fp32 (a gradient times a softmax weight leaves fp16's
range), multiplied in TF32 where entries and weights share a 16-bit dtype, exactly otherwise; sums are fp32. Every
program owns what it writes: two calls give the same bits.
Contract: `ref.lens_score_backward_ref`. N = 0 gives zeros.

Floor at N = 8192, E = 4096, P = 1, bf16: 7 x 67 MB + 67 MB written, 0.13 ms at 4.2 TB/s.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import differentiate
from .ref import EntryStream, score_formula
from .triton_launch import Launch
from .triton_plan import choose_tiles, launch_products, launch_weighted_sum, operand_dtype, precision_of
from .triton_streams import load_entries, multiply


@triton.jit
def spread(
    x, factors, vectors, along, grad, n, e, count, x_row, factors_row, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad[n] = sum_c factors[c, n] vectors[c] - along[n] x[n]. Grid: (blocks of N, tiles of E)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    for start in range(0, count, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = factors + c.to(tl.int64)[:, None] * factors_row + rows[None, :]
        w = tl.load(at, mask=(c < count)[:, None] & (rows < n)[None, :], other=0.0)
        at = vectors + c.to(tl.int64)[:, None] * e + columns[None, :]
        v = tl.load(at, mask=(c < count)[:, None] & (columns < e)[None, :], other=0.0)
        total = multiply(tl.trans(w), v, total, PRECISION)
    scale = tl.load(along + rows, mask=rows < n, other=0.0)
    total -= scale[:, None] * load_entries(x, rows, n, columns, e, x_row).to(tl.float32)
    at = grad + rows[:, None] * e + columns[None, :]
    tl.store(at, total.to(grad.dtype.element_ty), mask=(rows < n)[:, None] & (columns < e)[None, :])


def _launch_spread(x: Tensor, factors: Tensor, vectors: Tensor, along: Tensor, grad: Tensor, precision: str) -> Launch:
    (n, e), count = x.shape, vectors.shape[0]
    block_n, block_e, block_c = (32, 64, 32) if precision == "ieee" else (64, 128, 32)
    return Launch(
        spread,
        (triton.cdiv(n, block_n), triton.cdiv(e, block_e)),
        {"x": x, "factors": factors, "vectors": vectors, "along": along, "grad": grad, "n": n, "e": e, "count": count,
         "x_row": x.stride(0), "factors_row": factors.stride(0)},
        {"BLOCK_N": block_n, "BLOCK_E": block_e, "BLOCK_C": block_c, "PRECISION": precision},
        4,
        2,
    )  # fmt: skip


class _TritonStream(EntryStream):
    """Reads the entries with Triton and collects their gradient: each differentiated stream leaves its term."""

    def __init__(self, entries: Tensor, weight: Tensor) -> None:
        self._entries = entries
        self._precision = precision_of(operand_dtype(entries, weight))
        self._inverse = entries.new_empty(entries.shape[0], dtype=torch.float32)
        self._along = entries.new_zeros(entries.shape[0], dtype=torch.float32)
        self._terms: list[tuple[Tensor, Tensor]] = []

    def products(self, vectors: Tensor) -> Tensor:
        result: Tensor = _Products.apply(vectors, self)
        return result

    def sums(self, weights: Tensor) -> Tensor:
        result: Tensor = _Sums.apply(weights, self)
        return result

    def multiply(self, vectors: Tensor) -> Tensor:
        """Y [N, C], a view with contiguous columns."""
        n, e = self._entries.shape
        out = vectors.new_empty(vectors.shape[0], n)
        tiles = choose_tiles(n, e, vectors.shape[0], self._precision)
        launch_products(self._entries, vectors, out, tiles, self._precision, inverse=self._inverse).run()
        return out.T

    def scale(self, weights: Tensor) -> Tensor:
        """weights [N, C] over the entries' RMS, as [C, N]: what multiplies raw entries."""
        return (weights.T * self._inverse).contiguous()

    def sum(self, scaled: Tensor) -> Tensor:
        n, e = self._entries.shape
        tiles = choose_tiles(n, e, scaled.shape[0], self._precision)
        sums = scaled.new_empty(tiles.splits, scaled.shape[0], e)
        launch_weighted_sum(self._entries, scaled, sums, tiles, self._precision).run()
        return sums.sum(0)

    def add_term(self, scaled: Tensor, vectors: Tensor, along: Tensor) -> None:
        self._terms.append((scaled, vectors))
        self._along += along

    def gradient(self) -> Tensor:
        """Of the entries; after the formula has been differentiated."""
        grad = torch.empty(self._entries.shape, dtype=self._entries.dtype, device=self._entries.device)
        factors, vectors = (torch.cat(parts) for parts in zip(*self._terms, strict=True))
        along = self._along * self._inverse.square() / grad.shape[1]
        _launch_spread(self._entries, factors, vectors, along, grad, self._precision).run()
        return grad


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, stream: _TritonStream) -> Tensor:
        vectors = vectors.contiguous()
        y = stream.multiply(vectors)
        ctx.save_for_backward(vectors, y)
        ctx.stream = stream
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        vectors, y = ctx.saved_tensors
        scaled = ctx.stream.scale(grad)
        ctx.stream.add_term(scaled, vectors, (grad * y).sum(1))
        return ctx.stream.sum(scaled), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, stream: _TritonStream) -> Tensor:
        scaled = stream.scale(weights)
        ctx.save_for_backward(weights, scaled)
        ctx.stream = stream
        return stream.sum(scaled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weights, scaled = ctx.saved_tensors
        grad = grad.contiguous()
        grad_weights = ctx.stream.multiply(grad)
        ctx.stream.add_term(scaled, grad, (weights * grad_weights).sum(1))
        return grad_weights, None


def lens_score_backward_triton(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As `ref.lens_score_backward_ref`: gradients for entries, features, queries and the 18 weights in their dtypes."""
    *tensors, legal, n_heads = args
    if tensors[0].shape[0] == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
    entries, *others = tensors
    stream = _TritonStream(entries, others[2])

    def scores(*inputs: Tensor) -> Tensor:
        return score_formula([entries, *(x.float() for x in inputs)], legal, n_heads, stream)

    with torch.cuda.device_of(entries):
        grads = differentiate(scores, others, [grad])
        return stream.gradient(), *grads


def backward_launches(
    entries: Tensor, w_in: Tensor, n_queries: int, n_direct: int, n_heads: int, passes: int
) -> Iterator[Launch]:
    """Each kind of launch of a backward once, for the resource report (meta tensors)."""
    precision = precision_of(operand_dtype(entries, w_in))
    (n, e), vectors = entries.shape, n_heads * n_queries

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    for count in (vectors, vectors + n_direct):
        tiles = choose_tiles(n, e, count, precision)
        yield launch_products(entries, empty(count, e), empty(count, n), tiles, precision, inverse=empty(n))
        yield launch_weighted_sum(entries, empty(count, n), empty(tiles.splits, count, e), tiles, precision)
    count = vectors * (2 * passes + 1) + n_direct
    grad = torch.empty_like(entries)
    yield _launch_spread(entries, empty(count, n), empty(count, e), empty(n), grad, precision)
