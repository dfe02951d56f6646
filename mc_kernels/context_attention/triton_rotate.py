# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Rotation of all queries or keys into a tensor of their own, in Triton: for products that read each many times."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Heads, launch, strides
from .triton_tiles import LENGTHS, OF_SLOTS, band_steps, cos_sin, damping, load_pairs, rotate, store_pairs

BLOCK_N = 16


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=OF_SLOTS)
def rotate_kernel(
    x, positions, inv_freq, sigma, out, x_b, x_h, x_n, pos_b, pos_n, sigma_b, sigma_n, heads, N,
    D: tl.constexpr, HALF: tl.constexpr, HALF_ROT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x [B, heads, N, D] rotated into out [B, heads, N, 2 HALF], first members before second ones. Phases are computed
    once for all heads."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < N
    n = n.to(tl.int64)
    freq, step = band_steps(inv_freq, HALF, HALF_ROT)
    cos, sin = cos_sin(tl.load(positions + b * pos_b + n * pos_n, mask=ok, other=0).to(tl.int64), step)
    if sigma is not None:
        damp = damping(tl.load(sigma + b * sigma_b + n * sigma_n, mask=ok, other=0.0).to(tl.float32), freq)
        cos, sin = cos * damp, sin * damp
    for h in tl.range(0, heads):
        rows = x + b * x_b + tl.cast(h, tl.int64) * x_h + n * x_n
        first, second = load_pairs(rows, ok, BLOCK_N, HALF, HALF_ROT, D, INTERLEAVED)
        first, second = rotate(first, second, cos, sin)
        turned = out + ((b * heads + h) * N + n) * (2 * HALF)
        store_pairs(turned, ok, first, second, BLOCK_N, HALF, 0, 2 * HALF, False)


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor, sigma: Tensor | None, heads: Heads, into: Tensor) -> Tensor:
    """Launch the rotation of x [B, H, N, D] into `into` [B, H, N, padded]."""
    args = {
        "x": x, "positions": positions, "inv_freq": inv_freq, "sigma": sigma, "out": into,
        **strides(x=(x, "bhn"), pos=(positions, "bn"), sigma=(sigma, "bn")), "heads": x.shape[1], "N": x.shape[2],
    }  # fmt: skip
    constants = {
        "D": heads.dim, "HALF": heads.padded // 2, "HALF_ROT": heads.half_rot, "INTERLEAVED": heads.interleaved,
        "BLOCK_N": BLOCK_N,
    }  # fmt: skip
    launch(rotate_kernel, x.shape[0] * math.ceil(x.shape[2] / BLOCK_N), args, constants)
    return into
