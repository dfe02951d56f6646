# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""`collapse_` in Triton: one launch for all layers, sequences and KV heads.

    k, v [L,B,Hkv,S,D] written in place, any strides with a contiguous last dimension; see collapse.py, collapse_ref.py.
    No blocks and no moves, or an empty batch: nothing is launched.

One program serves one lane, (layer, sequence, head): it pools all blocks, then moves entries, then writes the gists.
Why that is free of races: lanes share no memory of the cache (the op refuses views that overlap) and each has its own
rows of the workspace, so programs need no order among them. Within a program the phases are separated by barriers,
which also make its threads' writes visible to each other. Blocks are pooled into the workspace, so that nothing of the
cache is written before all is read. The host has resolved the moves to a gather with distinct destinations
(collapse_stage.py); where no source is a destination, any order of reads and writes gives the same. Otherwise all
sources are read into the workspace before the first destination is written. No loop that writes the cache reads what it
writes, so it does not matter that loops may fetch ahead.

Floor for 8 blocks of 32 over the 32 layers of Llama-3-8B in bf16: blocks (34 MB) and M (34 MB) are read, 20 us at 3.35
TB/s (H100), 14 at 4.8 (H200). What moves comes on top, up to 224 entries a lane: 125 MB, 37 and 26 us in all. There are
256 lanes: with two programs a multiprocessor, each with 16 KB or more in flight, all are there at once. Small models
have fewer lanes (90) and are bound by the latency of the phases, as is one block. A gist goes through 2D elements of
workspace, in L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_report import Compilation
from .cases import MODELS
from .collapse_stage import Staged, stage
from .triton_pool import add_residual, compilation, operand, pool_tile, scratch
from .triton_tiling import REPORTED_DTYPES, TRITON_NAMES, Tiling, product_dtype, product_precision, tiling


@triton.jit
def copy_entries(
    from_ptr, from_table, from_entry, to_ptr, to_table, to_entry, n,
    D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Entry table[i] (i itself without a table) of one place to the like of another, i = 0 .. n - 1."""
    dims = tl.arange(0, DP)
    for start in tl.range(0, n, STEP, num_stages=1):
        i = start + tl.arange(0, STEP)
        mask = (i < n)[:, None] & (dims < D)[None, :]
        source, destination = i.to(tl.int64), i.to(tl.int64)
        if from_table is not None:
            source = tl.load(from_table + i, mask=i < n, other=0).to(tl.int64)
        if to_table is not None:
            destination = tl.load(to_table + i, mask=i < n, other=0).to(tl.int64)
        x = tl.load(from_ptr + source[:, None] * from_entry + dims[None, :], mask=mask)
        tl.store(to_ptr + destination[:, None] * to_entry + dims[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["n_blocks", "tile_blocks", "n_moves", "batch"])
def collapse_kernel(
    k_ptr, v_ptr, w_ptr, b_ptr, m_ptr, c_ptr, table_ptr, yk_ptr, yv_ptr, held_k_ptr, held_v_ptr,
    k_layer, k_batch, k_head, k_slot, v_layer, v_batch, v_head, v_slot, n_blocks, tile_blocks, n_moves, batch, heads,
    K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    head, row = lane % heads, lane // heads
    layer, sequence = row // batch, row % batch
    k_ptr += layer * k_layer + sequence * k_batch + head * k_head
    v_ptr += layer * v_layer + sequence * v_batch + head * v_head
    pool = layer * heads + head
    w_ptr += pool * (G * 2 * D)
    b_ptr += pool * (G * K)
    yk_ptr += lane * n_blocks * (G * D)
    yv_ptr += lane * n_blocks * (G * D)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DP)
    for first in range(0, n_blocks, tile_blocks):
        count = min(tile_blocks, n_blocks - first)
        yk, yv = pool_tile(
            k_ptr, v_ptr, table_ptr, 0, k_slot, 0, v_slot, first, count, w_ptr, b_ptr, K, D, G, KP, DP, ROWS, STAGES
        )
        at = first * (G * D)
        yk, yv = add_residual(
            yk, yv, yk_ptr + at, yv_ptr + at, count * G, m_ptr + pool * (4 * D * D), c_ptr + pool * (2 * D),
            D, DP, ROWS, INNER, PRODUCT, PRECISION,
        )  # fmt: skip
        to = at + rows[:, None] * D + dims[None, :]
        mask = (rows < count * G)[:, None] & (dims < D)[None, :]
        tl.store(yk_ptr + to, yk, mask=mask)
        tl.store(yv_ptr + to, yv, mask=mask)
    tl.debug_barrier()  # every block is read
    slots = table_ptr + n_blocks * K
    sources = slots + n_blocks * G
    if held_k_ptr is None:
        copy_entries(k_ptr, sources, k_slot, k_ptr, sources + n_moves, k_slot, n_moves, D, DP, STEP)
        copy_entries(v_ptr, sources, v_slot, v_ptr, sources + n_moves, v_slot, n_moves, D, DP, STEP)
    else:
        held_k_ptr += lane * n_moves * D
        held_v_ptr += lane * n_moves * D
        copy_entries(k_ptr, sources, k_slot, held_k_ptr, None, D, n_moves, D, DP, STEP)
        copy_entries(v_ptr, sources, v_slot, held_v_ptr, None, D, n_moves, D, DP, STEP)
        tl.debug_barrier()  # every source is read
        copy_entries(held_k_ptr, None, D, k_ptr, sources + n_moves, k_slot, n_moves, D, DP, STEP)
        copy_entries(held_v_ptr, None, D, v_ptr, sources + n_moves, v_slot, n_moves, D, DP, STEP)
    tl.debug_barrier()  # gists may go where an entry was moved from or to
    copy_entries(yk_ptr, None, D, k_ptr, slots, k_slot, n_blocks * G, D, DP, STEP)
    copy_entries(yv_ptr, None, D, v_ptr, slots, v_slot, n_blocks * G, D, DP, STEP)


def _tiling(n_blocks: int, block_size: int, head_dim: int, n_gists: int, product: torch.dtype) -> tuple[Tiling, int]:
    """The tiles, and how many entries are copied at a time (16 KB of keys in bf16). Models with small heads have fewer
    lanes than a GPU has multiprocessors, and products in fp32 take too many registers for four warps: eight then."""
    t = tiling(min(n_blocks, 16), block_size, head_dim, n_gists, product)
    wide = t.dp <= 64 or product == torch.float32
    return replace(t, warps=max(8, t.warps) if wide else t.warps), max(1, 8192 // t.dp)


def collapse_workspace(k: Tensor, w: Tensor, staged: Staged) -> int:
    """Bytes that `collapse_launch` needs: the gists, and what moves where moves are chained."""
    layers, batch, heads, _, d = k.shape
    gists = staged.n_blocks * w.shape[2] * product_dtype(k.dtype, w.dtype).itemsize
    held = staged.n_moves * k.dtype.itemsize if staged.chained else 0
    return 2 * layers * batch * heads * d * (gists + held)


def collapse_launch(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    staged: Staged,
    *,
    workspace: Tensor | None = None,
) -> None:
    """`collapse_` of what has been staged, on the current stream. workspace: `collapse_workspace` bytes (uint8); with
    it, and with contiguous weights, nothing is allocated. Nothing is checked here."""
    layers, batch, heads, _, d = k.shape
    n_gists, block_size = w.shape[2], b.shape[3]
    n, n_moves = staged.n_blocks, staged.n_moves
    if k.numel() == 0 or not (n or n_moves):
        return
    w, b, m, c = (x.contiguous() for x in (w, b, m, c))
    product = product_dtype(k.dtype, w.dtype)
    size = 2 * layers * batch * heads * d
    memory = scratch(workspace, collapse_workspace(k, w, staged), k)
    gists = size * n * n_gists * product.itemsize
    yk, yv = memory[:gists].view(product).view(2, -1)
    held_k, held_v = None, None
    if staged.chained:
        held_k, held_v = memory[gists : gists + size * n_moves * k.dtype.itemsize].view(k.dtype).view(2, -1)
    t, step = _tiling(n, block_size, d, n_gists, product)
    with torch.cuda.device_of(k):
        collapse_kernel[(layers * batch * heads,)](
            k, v, w, b, m, c, staged.table, yk, yv, held_k, held_v, *k.stride()[:4], *v.stride()[:4],
            n, t.blocks, n_moves, batch, heads, K=block_size, D=d, G=n_gists, **t.constexprs(),
            PRODUCT=operand(product), PRECISION=product_precision(k.dtype), STEP=step, num_warps=t.warps,
        )  # fmt: skip


def collapse_triton(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    children: Tensor,
    slots: Tensor,
    moves: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """See `collapse.py` for the arguments, `collapse_ref.py` for what they mean. Does not wait for the device. An
    engine that replays a CUDA graph calls `stage` and `collapse_launch` itself."""
    collapse_launch(k, v, w, b, m, c, stage(children, slots, moves, k.device), workspace=workspace)


def compilations() -> Iterator[Compilation]:
    for model in ("SmolLM2-135M", "Llama-3-8B"):
        d = MODELS[model][2]
        for data, weights in REPORTED_DTYPES:
            product = product_dtype(data, weights)
            data_type, weights_type, y_type = (f"*{TRITON_NAMES[x]}" for x in (data, weights, product))
            for chained in (False, True):
                t, step = _tiling(8, 32, d, 1, product)
                pointers = {
                    **dict.fromkeys(("k_ptr", "v_ptr", "held_k_ptr", "held_v_ptr"), data_type),
                    **dict.fromkeys(("w_ptr", "b_ptr", "m_ptr", "c_ptr"), weights_type),
                    **dict.fromkeys(("yk_ptr", "yv_ptr"), y_type), "table_ptr": "*i32",
                }  # fmt: skip
                constexprs = {
                    "K": 32, "D": d, "G": 1, **t.constexprs(), "PRODUCT": operand(product),
                    "PRECISION": product_precision(data), "STEP": step,
                }  # fmt: skip
                kind = f"{TRITON_NAMES[data]}, weights {TRITON_NAMES[weights]}{', chained moves' if chained else ''}"
                yield compilation(
                    f"{model}, {kind}", collapse_kernel, pointers,
                    [f"{x}_{axis}" for x in "kv" for axis in ("layer", "batch", "head", "slot")],
                    ("n_blocks", "tile_blocks", "n_moves", "batch", "heads"),
                    constexprs | ({} if chained else {"held_k_ptr": None, "held_v_ptr": None}), t.warps,
                )  # fmt: skip
