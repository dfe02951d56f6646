"""How the Triton kernels of `gist_pool` cut a call into programs, what they multiply in, and what they take.
Imported with the package: no Triton here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..triton_backend import power_of_two, refuse

HALVES = (torch.bfloat16, torch.float16)
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Data and weights whose resources are reported.
REPORTED_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
)
# Values of a padded block (keys) and of a padded tile of gists that sixteen warps can hold in registers; of twice as
# many they spill 900 bytes a thread.
MOST_VALUES = 1 << 14
# Bytes of blocks on their way in shared memory; an A100 gives a program 163 KB.
MOST_STAGED = 144 << 10


def product_dtype(data: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """What y and M are multiplied in: tensor cores take halves as they are; what is mixed or fp32 stays fp32."""
    return data if data == weights and data in HALVES else torch.float32


def product_precision(data: torch.dtype) -> str:
    """How fp32 operands are multiplied: exactly, or, where the result is rounded to a half anyway, by three products
    of tensor cores (error about 2^-21)."""
    return "ieee" if data == torch.float32 else "tf32x3"


@dataclass(frozen=True)
class Tiling:
    """How a call is cut. blocks: of one program. rows: gists of one program, padded. kp, dp: padded K and D. inner:
    rows of each quadrant of M that are multiplied at a time. stages: blocks in flight."""

    blocks: int
    rows: int
    kp: int
    dp: int
    inner: int
    stages: int
    warps: int

    def constexprs(self) -> dict[str, int]:
        return {"KP": self.kp, "DP": self.dp, "ROWS": self.rows, "INNER": self.inner, "STAGES": self.stages}


def tiling(
    n_blocks: int, block_size: int, head_dim: int, n_gists: int, product: torch.dtype, thread_values: int = 64
) -> Tiling:
    """Sixteen gists are the least that a tensor core takes; with many blocks of large heads 32 share one read of M. A
    thread holds up to `thread_values` of a block and of a tile's keys and values: at 64 the forward of a head of 128
    takes four warps of at most 256 registers, so that two programs share a multiprocessor; the backward holds more
    beside them. Three blocks are under way, fewer where they are large."""
    kp, dp = power_of_two(block_size), max(16, power_of_two(head_dim))
    most = 32 if n_blocks >= 64 and dp >= 128 and product != torch.float32 else 16
    blocks = max(1, min(power_of_two(n_blocks), most // n_gists))
    rows = max(16, power_of_two(blocks * n_gists))
    inner = 16 if product == torch.float32 else 32
    warps = min(16, max(4, max(kp, rows) * dp // (16 * thread_values)))
    stages = next(s for s in (3, 2, 1) if (s - 1) * 2 * kp * dp * product.itemsize <= MOST_STAGED)
    return Tiling(blocks, rows, kp, dp, inner, stages, warps)


def with_enough_registers(t: Tiling, data: torch.dtype) -> Tiling:
    """fp32 blocks of small heads have four warps by their size, which are then some registers short; and two for three
    in flight, whose addresses spill 8 bytes on sm_80."""
    return replace(t, warps=max(8, t.warps), stages=min(2, t.stages)) if data == torch.float32 and t.dp <= 64 else t


def many_and_few(head_dim: int, product: torch.dtype) -> list[int]:
    """Numbers of blocks of 32 that between them need every tiling; few and many may need the same."""
    few, many = (tiling(n, 32, head_dim, 1, product).constexprs() for n in (1, 256))
    return [256] if few == many else [1, 256]


def supports(k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor) -> str | None:
    """Reason why the kernels cannot take these tensors, or None."""
    reason = refuse(k, v, w, b, m, c)
    if reason is not None:
        return reason
    n_gists, block_size, head_dim = w.shape[2], b.shape[3], c.shape[2] // 2
    t = tiling(1, block_size, head_dim, n_gists, torch.float32)
    if t.kp * t.dp > MOST_VALUES or t.rows * t.dp > MOST_VALUES:
        return (
            f"expected blocks of K x D <= {MOST_VALUES} and G x D <= {MOST_VALUES} (padded to powers of "
            f"two), got K={block_size}, G={n_gists}, D={head_dim}"
        )
    return None
