"""What a forward of `lens_score` launches, read off the shapes of its arguments: block sizes, buffers, launches.

Nothing here touches memory. The contract and the reasoning about speed are in `triton_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..triton_arena import Arena
from ..triton_backend import power_of_two
from . import triton_query as query
from . import triton_streams as streams
from .triton_launch import Launch

_ROWS = 16
_WIDE = 512  # columns of a step of `linear` and `swiglu`
_ABSORB = 256  # of `absorb`
_PROGRAMS = 128  # about the SMs of an A100, H100 or B200: what a launch should at least be cut into


def cdiv(size: int, by: int) -> int:
    """Rounded up. Triton's own is wrapped for its compiler, and 36 calls of it were half of the host's time."""
    return -(-size // by)


def pad(size: int, least: int = 1, most: int = 1 << 30) -> int:
    """The next power of two within [least, most]."""
    return min(max(power_of_two(size), least), most)


@dataclass(frozen=True)
class Tiles:
    """How one shape is cut: block sizes, warps and stages of the streams, the split of N in `weighted_sum`."""

    n: int  # entries of a block of `products` and `weighted_sum`
    k: int  # step over E of `products` and `score_entries`
    c: int  # vectors of a tile
    e: int  # columns of a tile of `weighted_sum`
    score_n: int
    splits: int
    warps: int
    score_warps: int
    sum_warps: int
    stages: int
    sum_stages: int


def choose_tiles(n: int, e: int, count: int, precision: str, *, half: bool = False, hidden: int = 16) -> Tiles:
    """For N entries of width E, `count` vectors and a head of `hidden`; half: operands of 16 bits, else fp32.

    Blocks of 64 entries make 128 programs of N = 8192; larger ones read the vectors less often and are for when there
    are enough of them. Three stages keep 48 KB of entries in flight per SM, what 4 TB/s at 800 ns ask for. Exact fp32
    operands live in registers (no tensor cores), so their tiles are small.
    """
    wide, many, widest = e >= 2048, n >= 16384, pad(max(count, hidden))
    if half:
        c = pad(count, 16, 128)
        block = 128 if many and c <= 64 else 64
        score = max(16, min(block, 8192 // widest))
        span = (128 if many else 256) if wide and c <= 64 else 64
        warps = 8 if (c + block) * block > 64 * 64 else 4  # vectors and the entries' products among themselves
        score_warps = 8 if widest * score > 64 * 64 else 4
        sum_warps = 8 if c * span > 64 * 64 else 4
        cut = (128 if wide else 64, c, span, score), (warps, score_warps, sum_warps, 3, 2 if block == 128 else 3)
    elif precision == "tf32":
        block, c = 64, pad(count, 16, 64)
        cut = (64, c, 128 if wide else 64, 16), (4, 4, 8 if wide else 4, 3, 3)
    else:
        block, c = 32, pad(count, 16, 32)
        cut = (32, c, 64, 16), (4, 8, 4, 2, 3)
    programs = cdiv(e, cut[0][2]) * cdiv(count, c)
    splits = min(pad(cdiv(_PROGRAMS, programs)), pad(cdiv(n, block)), 16)
    return Tiles(block, *cut[0], splits, *cut[1])


def rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, a copy only where it has none."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def operand_dtype(entries: Tensor, weight: Tensor) -> torch.dtype:
    """Of the tensor cores' operands in a forward."""
    return entries.dtype if entries.dtype == weight.dtype else torch.float32


def precision_of(operand: torch.dtype) -> str:
    """Of products of fp32 operands: TF32 keeps what 16-bit data have, anything else is exact."""
    return "ieee" if operand == torch.float32 else "tf32"


def launch_products(
    x: Tensor, vectors: Tensor, out: Tensor, tiles: Tiles, precision: str, *, inverse: Tensor,
    maxima: Tensor | None = None, totals: Tensor | None = None,
) -> Launch:  # fmt: skip
    """y [count, N] of the entries and `vectors` [count, E] into `out`; with maxima and totals its softmax's parts.
    inverse [N]: 1 / rms of the entries, written."""
    (n, e), count = x.shape, vectors.shape[0]
    return Launch(
        streams.products,
        (cdiv(n, tiles.n), cdiv(count, tiles.c)),
        {"x": x, "vectors": vectors, "out": out, "inverse": inverse, "maxima": maxima, "totals": totals, "n": n,
         "width": out.shape[1], "e": e, "count": count, "x_row": x.stride(0), "out_row": out.stride(0)},
        {"SOFTMAX": maxima is not None, "BLOCK_C": tiles.c, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
         "PRECISION": precision},
        tiles.warps,
        tiles.stages,
    )  # fmt: skip


def launch_weighted_sum(
    x: Tensor, weights: Tensor, sums: Tensor, tiles: Tiles, precision: str, *, statistics: tuple[Tensor, ...] = ()
) -> Launch:
    """`sums` [splits, count, E] of weights [count, N] and x. statistics: maxima and totals of the blocks (from
    `products`) and of the splits (written)."""
    (n, e), (splits, count, _) = x.shape, sums.shape
    n_blocks = cdiv(n, tiles.n)
    maxima, totals, split_maxima, split_totals = statistics or (None,) * 4
    return Launch(
        streams.weighted_sum,
        (cdiv(e, tiles.e), splits, cdiv(count, tiles.c)),
        {"x": x, "weights": weights, "maxima": maxima, "totals": totals, "sums": sums, "split_maxima": split_maxima,
         "split_totals": split_totals, "n": n, "width": weights.shape[1], "e": e, "count": count,
         "x_row": x.stride(0), "weights_row": weights.stride(0), "n_blocks": n_blocks,
         "blocks_per_split": cdiv(n_blocks, splits)},
        {"SOFTMAX": bool(statistics), "BLOCK_C": tiles.c, "BLOCK_N": tiles.n, "BLOCK_E": tiles.e,
         "PRECISION": precision},
        tiles.sum_warps,
        tiles.sum_stages,
    )  # fmt: skip


def forward_launches(arena: Arena, out: Tensor, *args: Any) -> Iterator[Launch]:
    """The launches of a forward, in order; their buffers are taken from `arena` before the first one.

    args: those of `ref.lens_score_ref`.
    """
    *given, legal, n_heads = args
    (
        entries, features, queries, w_in, read_norm, read_q, read_k, read_v, read_out, mlp_norm, mlp_gate_up, mlp_down,
        score_norm, score_q, score_k, score_v, direct, head_in, head_bias, head_out, head_out_bias,
    ) = (rows(x) for x in given)  # fmt: skip
    (n, e), q, (passes, d, f), hidden = entries.shape, queries.shape[0], mlp_down.shape, head_in.shape[0]
    head_dim, value_dim = d // n_heads, score_v.shape[0] // n_heads
    h_pad = pad(n_heads)
    q_pad = pad(q, _ROWS // min(h_pad, _ROWS))
    count, hid = h_pad * q_pad, pad(hidden, _ROWS)
    operand = operand_dtype(entries, w_in)
    precision = precision_of(operand)
    half = operand != torch.float32
    tiles = choose_tiles(n, e, count, precision, half=half, hidden=hid)
    n_blocks, splits = cdiv(n, tiles.n), tiles.splits

    # Products on the side of the queries: steps over the inner dimension, splits of E, rows of a head at a time.
    step_e, step_d = pad(e, 16, 64), pad(d, 16, 64)
    norm_d, queue = (pad(d, 16, 512), 4) if half else (step_d, 2)  # stages
    # A step of these loops is a latency, pipelined or not: few and wide ones, all loads of a step under way together.
    limits = (d, _WIDE), (f, _WIDE), (d, _ABSORB)
    wide_d, wide_f, absorb_d = (pad(size, 16, most if half else 64) for size, most in limits)
    span_e, rows_d = pad(e, 16, 128 if e >= 2048 else 64), pad(head_dim, 16, 64)
    chunk_in = step_e * cdiv(e, 4 * step_e)
    chunk_read = step_e * cdiv(e, 16 * step_e)
    parts_in, parts_read = cdiv(e, chunk_in), cdiv(e, chunk_read)

    fp32 = torch.float32
    z, act, turned, attended = (arena.take(fp32, _ROWS, size) for size in (d, f, d, d))
    parts, squares = arena.take(fp32, max(parts_in, parts_read), _ROWS, d), arena.take(fp32, parts_in, _ROWS)
    vectors, folded = arena.take(operand, count, e), arena.take(fp32, count, hid)
    weights, inverse = arena.take(operand, count, n_blocks * tiles.n), arena.take(fp32, n)
    statistics = tuple(arena.take(fp32, blocks, count) for blocks in (n_blocks, n_blocks, splits, splits))
    sums = arena.take(fp32, splits, count, e)

    def collect(into: Tensor, n_parts: int, normed: bool) -> Launch:
        return Launch(
            query.collect,
            (cdiv(d, 32),),
            {"parts": parts, "squares": squares, "out": into, "n_queries": q, "e": e, "width": d},
            {"PARTS": n_parts, "NORMED": normed, "BLOCK_J": 32},
            4,
            1,
        )

    def turn(gain: Tensor, weight: Tensor) -> Launch:
        return Launch(
            query.turn,
            (cdiv(d, 16),),
            {"z": z, "gain": gain, "weight": weight, "turned": turned, "d": d, "w_row": weight.stride(0),
             "scale": head_dim**-0.5},
            {"BLOCK_J": 16, "BLOCK_K": absorb_d, "BLOCK_NORM": norm_d, "PRECISION": precision},
            8 if absorb_d > 64 else 4,
            1 if absorb_d > 64 else 2,
        )  # fmt: skip

    def absorb(gain: Tensor, w_k: Tensor, score: bool) -> Launch:
        tiles_e = cdiv(e, span_e)
        return Launch(
            query.absorb,
            (tiles_e + score, h_pad),
            {"z": z, "gain": gain, "turned": turned, "w_k": w_k, "vectors": vectors,
             "w_v": score_v if score else None, "head_in": head_in if score else None,
             "folded": folded if score else None, "e": e, "d": d, "head_dim": head_dim, "n_heads": n_heads,
             "k_row": w_k.stride(0), "v_row": score_v.stride(0), "in_row": head_in.stride(0), "value_dim": value_dim,
             "hidden": hidden, "tiles": tiles_e},
            {"Q_PAD": q_pad, "SCORE": score, "BLOCK_D": rows_d, "BLOCK_K": min(absorb_d, 128),
             "BLOCK_NORM": norm_d, "BLOCK_E": span_e, "BLOCK_V": 16, "BLOCK_HID": hid, "PRECISION": precision},
            8,
            1 if absorb_d > 64 else queue,
        )  # fmt: skip

    def linear(source: Tensor, weight: Tensor, step: int) -> Launch:
        return Launch(
            query.linear,
            (cdiv(d, 16),),
            {"z": z, "x": source, "weight": weight, "n_queries": q, "d": d, "width": weight.shape[1],
             "w_row": weight.stride(0)},
            {"BLOCK_J": 16, "BLOCK_K": step, "PRECISION": precision},
            8 if step > 64 else 4,
            1 if step > 64 else queue,
        )  # fmt: skip

    yield Launch(
        query.project_queries,
        (cdiv(d, 16), parts_in),
        {"queries": queries, "w_in": w_in, "parts": parts, "squares": squares, "n_queries": q, "e": e, "d": d,
         "query_row": queries.stride(0), "w_row": w_in.stride(0), "chunk": chunk_in},
        {"BLOCK_J": 16, "BLOCK_K": step_e if half else 16, "SPAN": 1 << 20 if half else 128,
         "PRECISION": precision},
        4,
        3 if half else 2,
    )  # fmt: skip
    yield collect(z, parts_in, True)
    for i in range(passes):
        yield turn(read_norm[i], read_q[i])
        yield absorb(read_norm[i], read_k[i], False)
        yield launch_products(
            entries, vectors, weights, tiles, precision, inverse=inverse, maxima=statistics[0], totals=statistics[1]
        )
        yield launch_weighted_sum(entries, weights, sums, tiles, precision, statistics=statistics)
        tiles_d = cdiv(head_dim, rows_d)
        yield Launch(
            query.attended_values,
            (n_heads * tiles_d, parts_read),
            {"sums": sums, "maxima": statistics[2], "totals": statistics[3], "w_v": read_v[i], "parts": parts,
             "n_queries": q, "n_rows": count, "e": e, "d": d, "head_dim": head_dim, "v_row": read_v.stride(1),
             "chunk": chunk_read, "tiles": tiles_d},
            {"SPLITS": splits, "Q_PAD": q_pad, "BLOCK_D": rows_d, "BLOCK_K": step_e if splits < 16 else min(step_e, 32),
             "PRECISION": precision},
            4,
            2,
        )  # fmt: skip
        yield collect(attended, parts_read, False)
        yield linear(attended, read_out[i], wide_d)
        yield Launch(
            query.swiglu,
            (cdiv(f, 16),),
            {"z": z, "gain": mlp_norm[i], "weight": mlp_gate_up[i], "out": act, "d": d, "width": f,
             "w_row": mlp_gate_up.stride(1)},
            {"BLOCK_J": 16, "BLOCK_K": min(wide_d, 128), "BLOCK_NORM": norm_d, "PRECISION": precision},
            8 if wide_d > 64 else 4,
            1 if wide_d > 64 else queue,
        )  # fmt: skip
        yield linear(act, mlp_down[i], wide_f)
    yield turn(score_norm, score_k)
    yield absorb(score_norm, score_q, True)
    yield Launch(
        streams.score_entries,
        (cdiv(n, tiles.score_n),),
        {"x": entries, "inverse": inverse, "features": features, "vectors": vectors, "folded": folded, "direct": direct,
         "head_in": head_in, "head_bias": head_bias, "head_out": head_out, "out_bias": head_out_bias,
         "legal": None if legal is None else legal.view(torch.uint8), "out": out, "n": n, "e": e, "n_queries": q,
         "n_heads": n_heads, "n_direct": direct.shape[0], "n_features": features.shape[1], "hidden": hidden,
         "before_match": score_v.shape[0], "x_row": entries.stride(0), "features_row": features.stride(0),
         "direct_row": direct.stride(0), "in_row": head_in.stride(0), "out_weight_row": head_out.stride(0),
         "legal_row": 0 if legal is None else legal.stride(0), "legal_column": 0 if legal is None else legal.stride(1),
         "log_queries": math.log(q)},
        {"H_PAD": h_pad, "Q_PAD": q_pad, "DIRECT": direct.shape[0] > 0, "MASKED": legal is not None,
         "BLOCK_N": tiles.score_n, "BLOCK_K": tiles.k, "BLOCK_HID": hid, "BLOCK_X": 16, "PRECISION": precision},
        tiles.score_warps,
        tiles.stages,
    )  # fmt: skip
