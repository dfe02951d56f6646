"""How `gist_encode`'s Triton kernels are laid out for a shape, and what a launch is.

One rule: the largest tile that still gives every SM a program. Large tiles reuse what they read (throughput), small
ones spread the weights over all SMs (latency).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from ..triton_report import Compilation

SMS = 128  # of an A100 to B200: 108 to 148


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


# Largest first. fp32 products run on the FMA units (TF32 would break the error rule).
_HALF = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(32, 32, 128, 4, 4), Tile(32, 16, 128, 4, 4))
_FLOAT = (Tile(64, 64, 16, 8, 4), Tile(32, 32, 16, 4, 4), Tile(16, 16, 64, 4, 3))
# The largest where the sum is over up to 256 columns: four steps of 64 are unrolled, and spill on sm_80.
_HALF_SHORT = (Tile(128, 128, 32, 8, 4), *_HALF[1:])
# With two accumulators: half as wide. The largest takes k = 32: at 64 it spills on sm_80.
_HALF_PAIR = (Tile(128, 64, 32, 8, 4), Tile(64, 32, 64, 4, 4), Tile(32, 16, 128, 4, 4))
_FLOAT_PAIR = (Tile(64, 32, 32, 8, 3), Tile(32, 16, 32, 4, 3), Tile(16, 16, 64, 4, 3))


@dataclass(frozen=True)
class LayerTile:
    """A whole layer on chip: `group` windows in `m` rows, weights `chunk` columns at a time."""

    m: int
    group: int
    chunk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BulkTiles:
    """Of the products whose operands go to the matrix units from shared memory (`triton_bulk`). attention.n: a head."""

    attention: Tile
    attention_out: Tile
    swiglu: Tile
    down: Tile


@dataclass(frozen=True)
class Plan:
    """Tiles of each product; `group` windows for a program of attention, in `attention.m` rows. layer: instead of
    attention to down, where a layer's activations stay on chip. bulk: likewise, for wider nets and many rows."""

    embed: Tile
    attention: Tile
    group: int
    attention_out: Tile
    swiglu: Tile
    down: Tile
    project: Tile
    layer: LayerTile | None
    bulk: BulkTiles | None = None


# For many rows. Two accumulators of 128 x 128, or one of 128 x 256, are 128 registers of a thread; a step is 48 KB.
BULK = BulkTiles(Tile(128, 64, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))


def power(n: int, least: int = 16) -> int:
    """The power of two that holds n, at least what a tensor core takes."""
    return max(least, triton.next_power_of_2(n))


def heuristics(
    rows: int, rows_per_window: int, gists: int, embed: int, width: int, ffn: int, n_heads: int, half: bool,
    bulk: bool = True,
) -> Plan:  # fmt: skip
    """rows: of all windows together. gists: rows after pooling. half: products of 16-bit numbers. bulk: on a device
    whose matrix units read shared memory (Hopper's); elsewhere the tiles of bulk kernels spill."""
    single, pair = (_HALF, _HALF_PAIR) if half else (_FLOAT, _FLOAT_PAIR)

    def largest(m: int, n: int, tiles: tuple[Tile, ...] = single) -> Tile:
        fits = (t for t in tiles if triton.cdiv(m, t.m) * triton.cdiv(n, t.n) >= SMS)
        return next(fits, tiles[-1])

    head = power(width // n_heads)
    window = power(rows_per_window)
    block = window
    for wider in (128, 64) if half else (64,):
        # Accumulators of queries, keys and values: 3 * wider * head fp32 registers in all.
        if wider > window and wider * head <= 128 * 64 and rows // wider * n_heads >= SMS:
            block = wider
            break
    warps = 8 if block * head > 32 * 64 else 4
    attention = Tile(block, head, 64 if half else 32, warps, 3)
    layer = _layer_on_chip(rows, rows_per_window, width) if half else None
    return Plan(
        embed=largest(rows, width),
        attention=attention,
        group=block // rows_per_window,
        attention_out=largest(rows, width, _HALF_SHORT if half and width <= 256 else single),
        swiglu=largest(rows, ffn, pair),
        down=largest(rows, width),
        project=largest(gists, embed),
        layer=layer,
        bulk=_bulk(rows, rows_per_window, width, ffn, width // n_heads) if half and bulk and layer is None else None,
    )


def _bulk(rows: int, rows_per_window: int, width: int, ffn: int, head: int) -> BulkTiles | None:
    """Where sizes fill the tiles, every SM gets two of the largest, and padding of windows is at most a quarter.

    A product that multiplies its rows by a gain in registers waits for each step, hence these: SmolLM2-135M/N4096 takes
    5.4 ms on an H200, 7.9 ms without them on an H100.
    """
    t = BULK
    m = t.attention.m
    fills = width % t.attention_out.n == width % t.down.n == ffn % t.swiglu.n == 0
    fills = fills and width % t.swiglu.k == width % t.attention_out.k == ffn % t.down.k == 0
    grouped = 4 * (m // rows_per_window * rows_per_window) >= 3 * m
    if not (fills and grouped and head == power(head) and rows >= 2 * SMS * m):
        return None
    return replace(t, attention=replace(t.attention, n=head)) if head <= t.attention.n else None


def _layer_on_chip(rows: int, rows_per_window: int, width: int) -> LayerTile | None:
    """For nets of up to 128, where every SM gets a program of 64 rows and padding is at most a quarter.

    Wider ones spill. Bytes a thread at Eg 256, 64 rows, 8 warps and chunks of 16, the least of all tried, on sm_80 /
    90 / 100: 200 / 56 / 400, with the rows as four tensors of 64 columns 216 / 0 / 40; with chunks of 32 over 400,
    with 128 rows over 500 (at Eg 128: 72 / 144 / 216). Fewer rows than 64 would read more weights for each row than
    separate kernels read of weights and activations together.
    """
    group = 64 // rows_per_window
    enough = 4 * group * rows_per_window >= 3 * 64 and rows >= SMS * group * rows_per_window
    fits = power(width) <= 128 and 4 * width >= 3 * power(width)
    return LayerTile(64, group, 16, 8, 2) if enough and fits else None


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments by name, tensors as pointers."""

    kernel: Any
    grid: int
    args: Mapping[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """On the current stream of the current device, which is to be the tensors'."""
        self.kernel[(self.grid,)](**self.args, num_warps=self.warps, num_stages=self.stages)

    def compilation(self, shape: str) -> Compilation:
        """This launch as it is specialised: 16-byte alignment of pointers, divisibility of integers, ones."""
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        aligned = []
        for parameter in self.kernel.params:
            name, value = parameter.name, self.args[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], constexprs[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + _TRITON_NAMES[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    aligned.append(name)
            elif isinstance(value, int):
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
            else:
                signature[name] = "fp32"
        return Compilation(shape, self.kernel, signature, constexprs, self.warps, self.stages, tuple(aligned))


_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
