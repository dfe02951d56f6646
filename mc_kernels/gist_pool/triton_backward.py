"""Backward of `gist_pool` in Triton, as `ref.gist_pool_backward_ref` writes it out; p and y are computed again.

    with o = [grad_k; grad_v]:  gy = o + o M^T;  ds_gj = p_gj (gy_g . x_j - sum_i p_gi gy_g . x_i)
    dx_j = sum_g p_gj gy_g + (u_j - n_j (n_j . u_j) / 2D) / rms_j,  u_j = sum_g ds_gj w_g
    dw_g = sum_j ds_gj n_j;  db = sum ds;  dc = sum o;  dM = y^T o          (sums over blocks and sequences)

Gradients for k, v, w, b, m, c, contiguous, in their dtypes; [0] for the groups not asked for. Empty inputs: zeros.

1. A program per row, head and tile of blocks, as in the forward: gy of the tile by a matrix product, then one read of
   each block. It writes dk and dv; of dw, db and dc its tile's sums, and y.
2. dM, one program per layer, head and slice of rows of M, over all of y and o of the head.
3. The tiles' sums are added in their order.
Nothing is added atomically: the same input gives the same bits.

Floor: the blocks are read once, and written once if the cache wants gradients (a frozen base model's does not). y, o
and the sums are a few hundredths of that; 2 and 3 run from L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as product_of

import torch
import triton
from torch import Tensor

from ..triton_backend import power_of_two
from ..triton_report import Compilation
from .cases import MODELS
from .triton_backward_kernels import backward_blocks_kernel, backward_matrix_kernel, backward_sums_kernel
from .triton_pool import check_out, compilation, operand, scratch
from .triton_tiling import (
    REPORTED_DTYPES,
    TRITON_NAMES,
    many_and_few,
    product_dtype,
    product_precision,
    tiling,
)

THREAD_VALUES = 32
# What the caller asks for, and the pointers that a kernel then does not get.
NEEDED = {"weights": ("dk_ptr", "dv_ptr"), "cache": ("y_ptr", "sums_ptr"), "cache and weights": ()}
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def gist_pool_backward_workspace(k: Tensor, w: Tensor, need_weights: bool) -> int:
    """Bytes that `gist_pool_backward_triton` needs for itself: y and the tiles' sums."""
    (r, h, n, block_size, d), g = k.shape, w.shape[2]
    if not (need_weights and k.numel()):
        return 0
    product = product_dtype(k.dtype, w.dtype)
    tiles = triton.cdiv(n, tiling(n, block_size, d, g, product).blocks)
    return r * h * (4 * tiles * (g * (2 * d + block_size) + 2 * d) + product.itemsize * n * g * 2 * d)


def gist_pool_backward_triton(
    grad_k: Tensor,
    grad_v: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    need_kv: bool,
    need_weights: bool,
    *,
    out: Gradients | None = None,
    workspace: Tensor | None = None,
) -> Gradients:
    """See `ref.gist_pool_backward_ref`. Runs on the current stream. out: contiguous gradients to write, [0] for what is
    not asked for; workspace: `gist_pool_backward_workspace` bytes (uint8). With both, with contiguous weights and
    incoming gradients, nothing is allocated."""
    needed = (need_kv, need_kv, need_weights, need_weights, need_weights, need_weights)
    shapes = [tuple(x.shape) if n else (0,) for x, n in zip((k, v, w, b, m, c), needed, strict=True)]
    if out is None:
        empty = [x.new_empty(shape) for x, shape in zip((k, v, w, b, m, c), shapes, strict=True)]
        out = (empty[0], empty[1], empty[2], empty[3], empty[4], empty[5])
    for name, x, like, shape in zip(("k", "v", "w", "b", "m", "c"), out, (k, v, w, b, m, c), shapes, strict=True):
        check_out(f"gradient of {name}", x, like, shape)
    (r, h, n, block_size, d), layers, g = k.shape, w.shape[0], w.shape[2]
    if k.numel() == 0:
        for x in out:
            x.zero_()
        return out
    if not (need_kv or need_weights):
        return out
    dk, dv, dw, db, dm, dc = out
    w, b, m, grad_k, grad_v = (x.contiguous() for x in (w, b, m, grad_k, grad_v))
    product, precision = product_dtype(k.dtype, w.dtype), product_precision(k.dtype)
    t = tiling(n, block_size, d, g, product, THREAD_VALUES)
    tiles = triton.cdiv(n, t.blocks)
    sums, y = None, None
    if need_weights:
        memory = scratch(workspace, gist_pool_backward_workspace(k, w, need_weights), k)
        n_y = r * h * n * g * 2 * d * product.itemsize
        size = 4 * r * h * tiles * (g * (2 * d + block_size) + 2 * d)
        sums, y = memory[:size].view(torch.float32), memory[size : size + n_y].view(product)
    with torch.cuda.device_of(k):
        backward_blocks_kernel[(r * h * tiles,)](
            grad_k, grad_v, k, v, w, b, m, dk if need_kv else None, dv if need_kv else None, y, sums,
            *k.stride()[:4], *v.stride()[:4], n, t.blocks, h, r // layers, K=block_size, D=d, G=g,
            **t.constexprs(), GP=power_of_two(g), PRODUCT=operand(product), PRECISION=precision,
            num_warps=t.warps,
        )  # fmt: skip
        if need_weights:
            matrix = _matrix_constexprs(d, product, precision)
            backward_matrix_kernel[(triton.cdiv(2 * d, matrix["SLICE"]), layers * h)](
                y, grad_k, grad_v, dm, n * g, h, r // layers, **matrix, num_warps=4
            )
            columns = g * (2 * d + block_size) + 2 * d
            backward_sums_kernel[(triton.cdiv(columns, 128), layers * h)](
                sums, dw, db, dc, r // layers * tiles, K=block_size, D=d, G=g, WIDTH=128, STEP=16, num_warps=4
            )
    return out


def _matrix_constexprs(head_dim: int, product: torch.dtype, precision: str) -> dict[str, object]:
    """Slices of dM: several programs a multiprocessor, and operands that fit its registers."""
    dp = max(16, power_of_two(head_dim))
    small = product == torch.float32
    return {
        "D": head_dim, "DP": dp, "SLICE": 32 if small else 64, "STEP": 16 if small else 32,
        "PRODUCT": operand(product), "PRECISION": precision,
    }  # fmt: skip


def compilations() -> Iterator[Compilation]:
    for model in ("SmolLM2-135M", "Llama-3-8B"):
        d = MODELS[model][2]
        for data, weights in REPORTED_DTYPES:
            product, precision = product_dtype(data, weights), product_precision(data)
            kind = f"{TRITON_NAMES[data]}, weights {TRITON_NAMES[weights]}"
            data_type, weights_type, y_type = (f"*{TRITON_NAMES[x]}" for x in (data, weights, product))
            shared = {"D": d, "PRODUCT": operand(product), "PRECISION": precision}
            pointers = {
                **dict.fromkeys(("ok_ptr", "ov_ptr", "k_ptr", "v_ptr", "dk_ptr", "dv_ptr"), data_type),
                **dict.fromkeys(("w_ptr", "b_ptr", "m_ptr"), weights_type), "y_ptr": y_type, "sums_ptr": "*fp32",
            }  # fmt: skip
            for n, (needed, missing) in product_of(many_and_few(d, product), NEEDED.items()):
                t = tiling(n, 32, d, 1, product, THREAD_VALUES)
                constexprs = shared | {"K": 32, "G": 1, "GP": 1, **t.constexprs()} | dict.fromkeys(missing)
                yield compilation(
                    f"{model}, N = {n}, {kind}, for {needed}", backward_blocks_kernel, pointers,
                    [f"{x}_{axis}" for x in "kv" for axis in ("row", "head", "block", "entry")],
                    ("n_blocks", "tile_blocks", "heads", "rows_per_layer"), constexprs, t.warps,
                )  # fmt: skip
            pointers = {"y_ptr": y_type, "ok_ptr": data_type, "ov_ptr": data_type, "dm_ptr": weights_type}
            yield compilation(
                f"{model}, {kind}", backward_matrix_kernel, pointers, (), ("n_gists", "heads", "rows_per_layer"),
                _matrix_constexprs(d, product, precision), 4,
            )  # fmt: skip
            pointers = {"sums_ptr": "*fp32", **dict.fromkeys(("dw_ptr", "db_ptr", "dc_ptr"), weights_type)}
            constexprs = {"K": 32, "D": d, "G": 1, "WIDTH": 128, "STEP": 16}
            yield compilation(f"{model}, {kind}", backward_sums_kernel, pointers, (), ("n_tiles",), constexprs, 4)
