"""Launches of `triton_bulk`'s kernels, and the buffers that they need."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .triton_bulk import bulk_attention_kernel, bulk_residual_kernel, bulk_swiglu_kernel, gained_kernel
from .triton_net import Buffers, BulkBuffers, Net
from .triton_plan import Launch, Plan, Tile, power

Sizes = list[tuple[int, torch.dtype]]


def is_bulk(launch: Launch) -> bool:
    """Whether only a plan with bulk kernels has it: theirs, and the embedding that leaves squares to them."""
    kernels = (gained_kernel, bulk_attention_kernel, bulk_residual_kernel, bulk_swiglu_kernel)
    return launch.kernel in kernels or launch.args.get("sums") is not None


def bulk_sizes(rows: int, net: Net, plan: Plan, dtype: torch.dtype) -> Sizes:
    """Numbers and dtype of the buffers of `BulkBuffers`; none without bulk kernels."""
    tiles = plan.bulk
    if tiles is None:
        return []
    parts = triton.cdiv(net.width, min(plan.embed.n, tiles.attention_out.n, tiles.down.n))
    gained = net.layers * net.width
    return [(gained * 3 * net.width, dtype), (gained * 2 * net.ffn, dtype), (parts * rows, torch.float32)]


def gained_launches(net: Net, to: BulkBuffers) -> Iterator[Launch]:
    """Once a call, before the layers."""
    for w, gain, gained in ((net.qkv, net.attn_norm, to.qkv), (net.gate_up, net.ffn_norm, to.gate_up)):
        layers, n, width = w.shape
        args = {
            "w": w, "gain": gain, "v": gained, "stride_layer": w.stride(0), "stride_w": w.stride(1),
            "stride_gain": gain.stride(0), "N": n, "WIDTH": width, "WIDTH_BLOCK": power(width), "BLOCK_N": 8,
        }  # fmt: skip
        yield Launch(gained_kernel, layers * triton.cdiv(n, 8), args)


def bulk_layers(windows: int, rows_each: int, net: Net, buffers: Buffers, plan: Plan) -> Iterator[Launch]:
    """buffers.h[0] and the squares of its rows -> buffers.h[-1]."""
    tiles, bulk = plan.bulk, buffers.bulk
    assert tiles is not None
    assert bulk is not None
    width, ffn, rows = net.width, net.ffn, windows * rows_each
    group, squares = tiles.attention.m // rows_each, bulk.squares
    parts = triton.cdiv(width, plan.embed.n)

    def residual(x: Tensor, w: Tensor, before: Tensor, out: Tensor, tile: Tile) -> Launch:
        args = {
            "x": x, "w": w, "residual": before, "out": out, "squares": squares, "n_rows": rows,
            "stride_w": w.stride(0), "IN": w.shape[1], "WIDTH": width, **tile.blocks(),
        }  # fmt: skip
        return Launch(
            bulk_residual_kernel, triton.cdiv(rows, tile.m) * (width // tile.n), args, tile.warps, tile.stages
        )

    for i in range(net.layers):
        before, middle, after = buffers.h[2 * i : 2 * i + 3]
        tile = tiles.attention
        yield Launch(
            bulk_attention_kernel,
            triton.cdiv(windows, group) * net.n_heads,
            {
                "h": before, "squares": squares, "qkv": bulk.qkv[i * 3 * width * width :], "phases": buffers.phases,
                "att": buffers.attention[i], "n_rows": rows, "ROWS": rows_each, "WIDTH": width,
                "HEAD_DIM": width // net.n_heads, "PARTS": parts, "GROUP": group, "BLOCK_M": tile.m, "BLOCK_K": tile.k,
            },
            tile.warps, tile.stages,
        )  # fmt: skip
        yield residual(buffers.attention[i], net.attn_out[i], before, middle, tiles.attention_out)
        parts, tile = width // tiles.attention_out.n, tiles.swiglu
        yield Launch(
            bulk_swiglu_kernel,
            triton.cdiv(rows, tile.m) * (ffn // tile.n),
            {
                "h": middle, "squares": squares, "w": bulk.gate_up[i * 2 * ffn * width :], "y": buffers.swiglu,
                "n_rows": rows, "WIDTH": width, "FFN": ffn, "PARTS": parts, **tile.blocks(),
            },
            tile.warps, tile.stages,
        )  # fmt: skip
        yield residual(buffers.swiglu, net.down[i], middle, after, tiles.down)
        parts = width // tiles.down.n
