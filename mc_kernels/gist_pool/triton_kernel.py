# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""`gist_pool` in Triton: one launch, one read of each block, and of M per tile of 16 or 32 gists.

    k, v [R,Hkv,N,K,D], any strides with a contiguous last dimension; w, b, m, c of R / B layers -> [R,Hkv,N,G,D] each

As ref.py has it: p = softmax_j(n_j . w + b_j), y = sum_j p_j x_j, out = y + y M + c; sums in fp32. Empty R, Hkv or N
give empty outputs; outputs alias nothing.

A program serves one row and head and a tile of blocks. Floor: a block is K * 2D elements (16 KB for Llama-3-8B in bf16)
and M 4 * D^2 (128 KB): with one block a head, M is the traffic (38 MB over all layers and heads: 11 us at 3.35 TB/s);
with hundreds the blocks are (1.14 GB: 340 us at N = 256), and M comes from L2, once per tile. Norm, logits and weighted
sum are 1.5 fused operations a byte read, which needs no tensor cores; y M is 4 a byte, which does. So both regimes are
bound by memory, and what counts is bytes in flight: blocks and slices of M are fetched ahead through shared memory,
with several programs a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_report import Compilation
from . import collapse_triton, triton_backward
from .cases import MODELS
from .triton_pool import add_residual, check_out, compilation, operand, pool_tile, scratch
from .triton_tiling import (
    REPORTED_DTYPES,
    TRITON_NAMES,
    many_and_few,
    product_dtype,
    product_precision,
    tiling,
    with_enough_registers,
)


@triton.jit(do_not_specialize=["n_blocks", "tile_blocks"])
def gist_pool_kernel(
    k_ptr, v_ptr, w_ptr, b_ptr, m_ptr, c_ptr, k_out_ptr, v_out_ptr, yk_ptr, yv_ptr,
    k_row, k_head, k_block, k_entry, v_row, v_head, v_block, v_entry, n_blocks, tile_blocks, heads, rows_per_layer,
    K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Tiles of a head are neighbours, so that M stays in L2 between them.
    tiles = tl.cdiv(n_blocks, tile_blocks)
    lane = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * tile_blocks
    row, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    layer = (row // rows_per_layer) * heads + head
    count = min(tile_blocks, n_blocks - first)
    yk, yv = pool_tile(
        k_ptr + row * k_row + head * k_head, v_ptr + row * v_row + head * v_head, None,
        k_block, k_entry, v_block, v_entry, first, count, w_ptr + layer * (G * 2 * D), b_ptr + layer * (G * K),
        K, D, G, KP, DP, ROWS, STAGES,
    )  # fmt: skip
    out = (lane.to(tl.int64) * n_blocks + first) * (G * D)
    yk, yv = add_residual(
        yk, yv, yk_ptr + out, yv_ptr + out, count * G, m_ptr + layer * (4 * D * D), c_ptr + layer * (2 * D),
        D, DP, ROWS, INNER, PRODUCT, PRECISION,
    )  # fmt: skip
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DP)
    mask = (rows < count * G)[:, None] & (dims < D)[None, :]
    tl.store(k_out_ptr + out + rows[:, None] * D + dims[None, :], yk, mask=mask)
    tl.store(v_out_ptr + out + rows[:, None] * D + dims[None, :], yv, mask=mask)


def gist_pool_workspace(k: Tensor, w: Tensor) -> int:
    """Bytes that `gist_pool_triton` needs for itself: none, or those of y where the output's dtype would round it."""
    if product_dtype(k.dtype, w.dtype) == k.dtype:
        return 0
    r, h, n, _, d = k.shape
    return 4 * 2 * r * h * n * w.shape[2] * d


def gist_pool_triton(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ref.gist_pool_ref`. Runs on the current stream.

    out: contiguous k_gist and v_gist to write. workspace: `gist_pool_workspace` bytes (uint8). With both, and with
    contiguous weights, nothing is allocated. Apart from the shapes of `out` nothing is checked here.
    """
    r, h, n, block_size, d = k.shape
    layers, _, n_gists, _ = w.shape
    shape = (r, h, n, n_gists, d)
    if out is None:
        out = (k.new_empty(shape), v.new_empty(shape))
    k_gist, v_gist = (check_out(name, x, k, shape) for name, x in zip(("k_gist", "v_gist"), out, strict=True))
    if k_gist.numel() == 0:
        return k_gist, v_gist
    w, b, m, c = (x.contiguous() for x in (w, b, m, c))
    product = product_dtype(k.dtype, w.dtype)
    yk, yv = k_gist, v_gist  # y passes through the output's own rows where the dtype allows
    if product != k.dtype:
        size = gist_pool_workspace(k, w)
        yk, yv = scratch(workspace, size, k)[:size].view(torch.float32).view(2, -1)
    t = with_enough_registers(tiling(n, block_size, d, n_gists, product), k.dtype)
    with torch.cuda.device_of(k):
        gist_pool_kernel[(r * h * triton.cdiv(n, t.blocks),)](
            k, v, w, b, m, c, k_gist, v_gist, yk, yv, *k.stride()[:4], *v.stride()[:4], n, t.blocks, h, r // layers,
            K=block_size, D=d, G=n_gists, **t.constexprs(),
            PRODUCT=operand(product), PRECISION=product_precision(k.dtype), num_warps=t.warps,
        )  # fmt: skip
    return k_gist, v_gist


def _forward_compilations() -> Iterator[Compilation]:
    for model in ("SmolLM2-135M", "Llama-3-8B"):
        d = MODELS[model][2]
        for data, weights in REPORTED_DTYPES:
            product = product_dtype(data, weights)
            data_type, weights_type, y_type = (f"*{TRITON_NAMES[x]}" for x in (data, weights, product))
            for n in many_and_few(d, product):
                t = with_enough_registers(tiling(n, 32, d, 1, product), data)
                pointers = {
                    **dict.fromkeys(("k_ptr", "v_ptr", "k_out_ptr", "v_out_ptr"), data_type),
                    **dict.fromkeys(("w_ptr", "b_ptr", "m_ptr", "c_ptr"), weights_type),
                    **dict.fromkeys(("yk_ptr", "yv_ptr"), y_type),
                }
                constexprs = {
                    "K": 32, "D": d, "G": 1, **t.constexprs(), "PRODUCT": operand(product),
                    "PRECISION": product_precision(data),
                }  # fmt: skip
                yield compilation(
                    f"{model}, N = {n}, {TRITON_NAMES[data]}, weights {TRITON_NAMES[weights]}", gist_pool_kernel,
                    pointers, [f"{x}_{axis}" for x in "kv" for axis in ("row", "head", "block", "entry")],
                    ("n_blocks", "tile_blocks", "heads", "rows_per_layer"), constexprs, t.warps,
                )  # fmt: skip


def compilations() -> Iterable[Compilation]:
    """What the three kernels' host code launches for models' shapes (`triton_report.py`)."""
    yield from _forward_compilations()
    yield from triton_backward.compilations()
    yield from collapse_triton.compilations()
