"""Host side that the Triton kernels of `context_attention` share: tiles, scratch memory, launches.

`recording` collects what would be launched instead of launching it: ahead-of-time compilation sees exactly the
configurations of the host code, run on meta tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..triton_report import Compilation
from ..triton_specialisation import specialise

# What the interpreter pretends to run on, so that short test inputs are split too; and a GPU not to be asked (meta).
INTERPRETER_MULTIPROCESSORS = 8
H100_MULTIPROCESSORS = 132
REGISTERS = 1 << 16  # of a multiprocessor
FEW_ROWS = 64
LEAST_SPLIT = 128
MOST_SPLITS = 128

Scratch = dict[str, tuple[tuple[int, ...], torch.dtype]]
_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
_recorded: list[Compilation] | None = None
_shape_name = ""


@dataclass(frozen=True)
class Heads:
    """How a head is laid out, as the kernels' constants: see triton_tiles.py."""

    group: int
    dim: int
    padded: int
    half_rot: int
    interleaved: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, inv_freq: Tensor | None, interleaved: bool) -> Heads:
        dim = q.shape[-1]
        half_rot = 0 if inv_freq is None else len(inv_freq)
        # Matrix products take at least 16, the width of one member of the pairs.
        return cls(
            q.shape[1] // k.shape[1], dim, max(32, triton.next_power_of_2(dim)), half_rot, interleaved and half_rot > 0
        )


def turning(inv_freq: Tensor | None) -> Tensor | None:
    """The frequencies as the kernels read them; None where no dimension turns."""
    return None if inv_freq is None or inv_freq.numel() == 0 else inv_freq.contiguous()


@dataclass(frozen=True)
class Tiles:
    """What one launch of the forward does. rotate_on_read: else q and k are rotated by a pass of their own. registers:
    that a thread may have; None: as the compiler sees fit."""

    block_m: int
    block_s: int
    num_warps: int
    num_stages: int
    registers: int | None
    splits: int
    chunk: int
    rotate_on_read: bool
    skip_future: bool


def skips_future(queries: int, slots: int) -> bool:
    """Whether to look for the part of the slots that a block sees: worth a scan of the positions only where the
    queries span a good part of the timeline."""
    return 8 * queries >= slots


def forward_tiles(q: Tensor, k: Tensor, heads: Heads, extras: bool = False) -> Tiles:
    """The heuristics of the forward; see triton_kernel.py for the reasons. extras: sigma, bias or mass, which never
    take more splits."""
    batch, kv_heads, queries, slots = q.shape[0], k.shape[1], q.shape[2], k.shape[2]
    rows = heads.group * queries
    few = rows <= FEW_ROWS
    block_m, block_s, warps, stages, resident, registers = 128, 64, 8, 3, 2, None
    if few:
        block_m, warps = max(16, triton.next_power_of_2(rows)), 4
        block_s = 128 if heads.padded <= 64 and block_m <= 32 else 64
        stages = 2 if heads.padded > 64 and block_m == 64 else 3  # 3 would spill on sm_80
    if heads.padded > 128:
        block_m, block_s, warps, stages = min(block_m, 64), 32, 8, 2
    if q.dtype == torch.float32:  # no tensor cores: operands of a product lie in registers
        block_m, block_s, stages = (16, 16, 2) if few else (32, 32 if heads.padded <= 128 else 16, 2)
    least = LEAST_SPLIT
    if block_m == 16 and heads.padded <= 128 and q.dtype != torch.float32:
        # What the last tile costs when its bytes are there is not hidden: small ones.
        block_s = least = 32
        resident = 3 if extras else 4  # in 128 registers, extras would spill
        registers = REGISTERS // (resident * warps * 32) // 8 * 8
    programs = batch * kv_heads * math.ceil(rows / block_m)
    splits = max(1, min(resident * multiprocessors(q.device) // programs, slots // least, MOST_SPLITS))
    chunk = math.ceil(math.ceil(slots / splits) / block_s) * block_s
    skip = not few and skips_future(queries, slots)
    return Tiles(block_m, block_s, warps, stages, registers, math.ceil(slots / chunk), chunk, few, skip)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return H100_MULTIPROCESSORS if device.type == "meta" else INTERPRETER_MULTIPROCESSORS


def scratch_bytes(scratch: Scratch) -> int:
    return sum(_padded_bytes(*shape_and_dtype) for shape_and_dtype in scratch.values())


def _padded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.ceil(math.prod(shape) * dtype.itemsize / 256) * 256


def carve(scratch: Scratch, workspace: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    """The scratch tensors, inside `workspace` if there is one, else fresh."""
    if workspace is None:
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in scratch.items()}
    need = scratch_bytes(scratch)
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or workspace.numel() < need or workspace.stride(0) != 1:
        raise ValueError(
            f"workspace: expected {need} contiguous bytes (uint8), got {workspace.dtype} {list(workspace.shape)}"
        )
    if need and workspace.data_ptr() % 16:
        raise ValueError("workspace: expected an address that is a multiple of 16")
    found, start = {}, 0
    for name, (shape, dtype) in scratch.items():
        size = math.prod(shape) * dtype.itemsize
        found[name] = workspace[start : start + size].view(dtype).view(shape)
        start += _padded_bytes(shape, dtype)
    return found


def check_out(name: str, x: Tensor, like: Tensor | tuple[tuple[int, ...], torch.dtype], *, contiguous: bool) -> None:
    shape, dtype = (tuple(like.shape), like.dtype) if isinstance(like, Tensor) else like
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(f"out: expected {name} {list(shape)} {dtype}, got {list(x.shape)} {x.dtype}")
    if not (x.is_contiguous() if contiguous else x.stride(-1) == 1 or x.shape[-1] <= 1):
        raise ValueError(f"out: expected contiguous {name}, got strides {list(x.stride())}")


def strides(**tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """prefix=(tensor, "bht") -> prefix_b, prefix_h, prefix_t; zeros for None."""
    return {
        f"{prefix}_{letter}": 0 if x is None else x.stride(i)
        for prefix, (x, letters) in tensors.items()
        for i, letter in enumerate(letters)
    }


def launch(
    kernel: Any, programs: int, args: Mapping[str, Any], constants: Mapping[str, Any], warps: int = 4, stages: int = 2,
    registers: int | None = None,
) -> None:  # fmt: skip
    """Run `programs` instances on the current stream."""
    if _recorded is None:
        kernel[(programs,)](**args, **constants, num_warps=warps, num_stages=stages, maxnreg=registers)
    else:
        _recorded.append(_compilation(kernel, args, constants, warps, stages, registers))


def _compilation(
    kernel: Any, args: Mapping[str, Any], constants: Mapping[str, Any], warps: int, stages: int, registers: int | None
) -> Compilation:
    signature, fixed, aligned = specialise(kernel, args, _TYPES)
    fixed = {**constants, **fixed}
    signature |= dict.fromkeys(fixed, "constexpr")
    return Compilation(_shape_name, kernel, signature, fixed, warps, stages, aligned, registers)


@contextmanager
def recording(shape: str) -> Iterator[list[Compilation]]:
    """Within this context `launch` launches nothing; the list fills with what it would have."""
    global _recorded, _shape_name
    _recorded, _shape_name = [], shape
    try:
        yield _recorded
    finally:
        _recorded = None
