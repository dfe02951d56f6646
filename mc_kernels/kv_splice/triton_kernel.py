"""`kv_splice_` in Triton, host side: the plan's way to the GPU, sizes of tiles, one launch for all layers and heads.

Contract: `ref.py`. Kernels: `triton_ordered.py`, `triton_slots.py`, from the parts in `triton_tiles.py`. Only survivors
and inserted entries are read, only their destinations are written; a plan that does nothing and empty tensors launch
nothing.

Floor, ordered. A moved entry's keys and values are read once and written once, 4 * D * sizeof(dtype) bytes a head and
row, over the copy bandwidth (Llama-3-8B in bf16, 8,192 entries: 2.1 GB, 0.45 ms at 4.8 TB/s). A lane must be walked in
order, so bandwidth comes from many lanes and from bytes in flight: by Little's law 2.4 TB/s of reads at 1 us of loaded
latency need 18 KB in flight an SM. R * Hkv * 2 lanes (512 for the case above, four an SM) with a tile of 8 to 16 KB on
its way while the one before is stored give twice that and more. Where there are few lanes tiles are larger and columns
are shared out, to no less than 64 bytes, which is what DRAM delivers.

Phases. Packed positions: all keys of a segment turn by its shift: a lane computes one phase a segment and band, which
is fewer than one an entry and band; of inserted entries, a handful, one a lane. With explicit positions each entry
has its own phase: a lane then holds the keys of up to 16 heads and computes it once for them. A table in memory would
cost more: 8 bytes a pair and head, as many as the key itself.

Floor, slots. O(edit): 31 moves and one insertion of the case above are 8.6 MB, 2 us; the launch and four dependent
reads (bounds, slots, entry) are the time. Tiles are small, so that one edit spreads over all SMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..splicing import Ints, expand_ranges
from ..triton_backend import power_of_two
from ..triton_report import Compilation
from .triton_ordered import splice_ordered
from .triton_slots import splice_slots


class Tiles(NamedTuple):
    """ordered: a lane's tiles. turn: [turn_entries, heads, 2 * bands], copy: [copy_entries, 1, columns].
    slots: [turn_entries, heads, 2 * bands or columns]; copy_entries is not used."""

    turn_entries: int
    heads: int
    bands: int
    copy_entries: int
    columns: int
    warps: int


def _power_of_2(n: int) -> int:
    return power_of_two(n)


def cdiv(size: int, by: int) -> int:
    """Rounded up; Triton's own costs microseconds a call."""
    return -(-size // by)


def choose_tiles(
    ordered: bool, rows: int, heads: int, dim: int, half: int, explicit_positions: bool, itemsize: int
) -> Tiles:
    """Sizes of tiles for a shape. See the module for what they aim at."""
    columns, bands = min(_power_of_2(dim), 256), min(_power_of_2(half), 128)
    all_heads = min(_power_of_2(heads), 16)
    if not ordered:
        entries = max(1, (16 << 10) // (all_heads * columns * itemsize))
        return Tiles(entries, all_heads, bands, entries, columns, 8)
    turn_heads = all_heads if explicit_positions and half else 1
    while rows * heads * (_power_of_2(dim) // columns) < 64 and columns * itemsize > 64:
        columns //= 2
    while rows * heads // turn_heads * (_power_of_2(half) // bands) < 64 and bands * itemsize > 64:
        bands //= 2
    # Phases of each entry take registers: with eight warps they spill.
    warps = 4 if rows * heads >= 192 or turn_heads > 1 else 8
    tile = warps * (2 << 10) // itemsize
    return Tiles(
        max(1, tile // (turn_heads * 2 * bands)), turn_heads, bands, max(1, tile // columns), columns, warps
    )  # fmt: skip


def _pairs(segments: Ints, stays: Ints, bounds: Ints) -> tuple[Ints, Ints]:
    """Pairs (source, destination), of each plan first those that move, then those that stay; the bounds that count
    them."""
    counts = np.array(bounds)
    counts[:, :2] = 0
    parts = []
    for p, (low, high) in enumerate(pairwise(bounds.tolist())):
        moving, staying = segments[low[0] : high[0]], stays[low[1] : high[1]]
        source, destination, count = np.concatenate((moving, staying)).T
        parts.append(np.stack((expand_ranges(source, count), expand_ranges(destination, count)), axis=1))
        counts[p + 1, :2] = counts[p, 0] + len(parts[-1]), counts[p, 1] + int(staying[:, 2].sum())
    return np.concatenate(parts), counts


class _Words(NamedTuple):
    """What goes to the GPU in one copy, int64: arrays end to end, and where each begins (`at`; its end is the next)."""

    arrays: list[Ints]
    at: list[int]


def _words(
    rows: Tensor | None, ordered: bool, segments: Tensor, stays: Tensor, insert_slots: Tensor, offsets: Tensor,
    positions: Tensor | None, new_positions: Tensor | None, inv_freq: Tensor | None,
) -> _Words:  # fmt: skip
    """bounds [P+1, 5]; rows; segments (slots: pairs); stays; insert_slots; positions and new_positions where they lie
    on the CPU."""
    none = np.zeros(0, np.int64)
    moves, still, bounds = segments.numpy(), stays.numpy(), offsets.numpy()
    if inv_freq is None:
        still, bounds = np.zeros((0, 3), np.int64), bounds * np.array([1, 0, 1, 1, 1])
    if not ordered:
        moves, bounds = _pairs(moves, still, bounds)
        still = none
    arrays = [bounds, none if rows is None else rows.numpy(), moves, still, insert_slots.numpy()]
    arrays += [none if x is None or x.device.type != "cpu" else x.numpy() for x in (positions, new_positions)]
    return _Words([x.reshape(-1) for x in arrays], np.cumsum([0] + [x.size for x in arrays]).tolist())


def _upload(words: _Words, device: torch.device, workspace: Tensor | None, staging: Tensor | None) -> Tensor:
    """The words on the device, by one asynchronous copy from pinned memory."""
    size = words.at[-1]
    for name, given in (("workspace", workspace), ("staging", staging)):
        if given is not None and (given.dtype != torch.int64 or given.dim() != 1 or given.shape[0] < size):
            raise ValueError(f"{name}: expected at least {size} int64, got {given.dtype} {list(given.shape)}")
    on_gpu = device.type == "cuda"
    if staging is None:
        # Of torch's caching allocator: memory comes back from it once the copy that reads it is done.
        staging = torch.empty(size, dtype=torch.int64, pin_memory=on_gpu)
    np.concatenate(words.arrays, out=staging.numpy()[:size])
    if workspace is None:
        if not on_gpu:
            return staging
        workspace = torch.empty(size, dtype=torch.int64, device=device)
    workspace[:size].copy_(staging[:size], non_blocking=True)
    return workspace


def kv_splice_workspace(
    rows: Tensor | None, ordered: bool, segments: Tensor, stays: Tensor, insert_slots: Tensor, offsets: Tensor,
    positions: Tensor | None, new_positions: Tensor | None, inv_freq: Tensor | None,
) -> int:  # fmt: skip
    """int64 elements that `workspace` and `staging` of a call with these arguments must have."""
    return _words(rows, ordered, segments, stays, insert_slots, offsets, positions, new_positions, inv_freq).at[-1]


def kv_splice_triton(
    k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, table: Tensor | None, rows: Tensor | None, ordered: bool,
    segments: Tensor, stays: Tensor, insert_slots: Tensor, offsets: Tensor, positions: Tensor | None,
    new_positions: Tensor | None, inv_freq: Tensor | None, interleaved: bool, attention_scaling: float,
    *, workspace: Tensor | None = None, staging: Tensor | None = None,
) -> None:  # fmt: skip
    """Splice on the current stream. See `op.py` for the flat arguments (k and v have their layer dimension, the plan
    is on the CPU), `ref.py` for what they mean.

    workspace: int64 on k's device, staging: int64 in pinned memory, `kv_splice_workspace(...)` elements each. With both
    nothing is allocated, and the call can be captured in a CUDA graph: a replay reads `staging` anew, so a plan of the
    same shape may be written there before. Neither may be changed while the splice is under way.
    """
    n_rows, heads, _, dim = k_new.shape
    half = 0 if inv_freq is None else inv_freq.shape[-1]
    words = _words(rows, ordered, segments, stays, insert_slots, offsets, positions, new_positions, inv_freq)
    explicit = positions is not None or new_positions is not None
    if n_rows * heads * dim == 0 or not (words.at[3] > words.at[2] or words.at[5] > words.at[3]):
        return
    tiles = choose_tiles(ordered, n_rows, heads, dim, half, explicit, k.element_size())
    with torch.cuda.device_of(k):
        device_words = _upload(words, k.device, workspace, staging)
        given = [
            device_words[words.at[i] : words.at[i + 1]] if x is not None and x.device.type == "cpu" else x
            for i, x in ((5, positions), (6, new_positions))
        ]
        arguments = [
            k, v, k_new, v_new, table, device_words, *given, inv_freq, n_rows,
            k.shape[1] if table is None else table.shape[0], heads,
        ]  # fmt: skip
        strides = [
            *k.stride()[:4], *v.stride()[:4], *k_new.stride()[:3], *v_new.stride()[:3],
            *((0, 0) if table is None else table.stride()),
            *((0, 0) if inv_freq is None else (0, *inv_freq.stride())[-2:]),
        ]  # fmt: skip
        constants: dict[str, Any] = {
            "DIM": dim, "HALF": half, "INTERLEAVED": interleaved, "ROWS": rows is not None,
            "PAGE": 0 if table is None else k.shape[3], "HEADS": tiles.heads, "BANDS": tiles.bands,
            "COLUMNS": tiles.columns, "num_warps": tiles.warps,
        }  # fmt: skip
        if ordered:
            turning = n_rows * cdiv(heads, tiles.heads) * cdiv(half, tiles.bands)
            copying = cdiv(dim - 2 * half, tiles.columns) + cdiv(dim, tiles.columns)
            splice_ordered[(turning + n_rows * heads * copying,)](
                *arguments, *words.at[1:5], *strides, attention_scaling, **constants, POSITIONS=explicit,
                TURN_ENTRIES=tiles.turn_entries, COPY_ENTRIES=tiles.copy_entries,
            )  # fmt: skip
        else:
            ends = words.arrays[0].reshape(-1, 5)
            most = max(
                cdiv(b[0] - a[0], tiles.turn_entries) + cdiv(b[2] - a[2], tiles.turn_entries)
                for a, b in pairwise(ends.tolist())
            )
            parts = cdiv(half, tiles.bands) + cdiv(dim - 2 * half, tiles.columns) + cdiv(dim, tiles.columns)
            splice_slots[(most * n_rows * cdiv(heads, tiles.heads) * parts,)](
                *arguments, most, words.at[1], words.at[2], words.at[4], *strides, attention_scaling, **constants,
                ENTRIES=tiles.turn_entries,
            )  # fmt: skip


# layers, KV heads, head dimension
_SHAPES = {"SmolLM2-135M": (30, 3, 64), "Llama-3-8B": (32, 8, 128)}


def compilations() -> Iterator[Compilation]:
    """Ordered with packed and with explicit positions, without rotation, paged, interleaved; slots likewise."""
    variants = (
        # ordered, rotated, explicit positions, interleaved, page
        (True, True, False, False, 0),
        (True, True, False, True, 0),
        (True, True, True, False, 0),
        (True, False, False, False, 0),
        (True, True, False, False, 16),
        (False, True, True, False, 0),
        (False, True, True, True, 0),
        (False, False, False, False, 0),
        (False, False, False, False, 16),
    )
    for shape, (layers, heads, dim) in _SHAPES.items():
        for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
            for variant in variants if dtype == "bf16" else (variants[0], variants[1], variants[5]):
                yield _compilation(f"{shape} {dtype}", dtype, itemsize, layers, heads, dim, *variant)


def _compilation(
    shape: str, dtype: str, itemsize: int, layers: int, heads: int, dim: int, ordered: bool, rotated: bool,
    explicit: bool, interleaved: bool, page: int,
) -> Compilation:  # fmt: skip
    kernel = splice_ordered if ordered else splice_slots
    half = dim // 2 if rotated else 0
    tiles = choose_tiles(ordered, layers, heads, dim, half, explicit, itemsize)
    constants: dict[str, Any] = {
        "DIM": dim, "HALF": half, "INTERLEAVED": interleaved, "ROWS": False, "PAGE": page, "HEADS": tiles.heads,
        "BANDS": tiles.bands, "COLUMNS": tiles.columns,
    }  # fmt: skip
    if ordered:
        constants |= {
            "POSITIONS": explicit, "TURN_ENTRIES": tiles.turn_entries, "COPY_ENTRIES": tiles.copy_entries,
        }  # fmt: skip
    else:
        constants["ENTRIES"] = tiles.turn_entries
    absent = [
        *([] if page else ["table"]), *([] if rotated else ["inv_freq"]), *([] if explicit else ["before", "after"]),
    ]  # fmt: skip
    pointers = {
        **dict.fromkeys(("k", "v", "k_new", "v_new"), f"*{dtype}"), "table": "*i32", "words": "*i64",
        "before": "*i64", "after": "*i64", "inv_freq": "*fp32", "scaling": "fp32",
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants or name in absent else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    strides = [
        n for n in kernel.arg_names if n.split("_")[0] in ("k", "v", "kn", "vn") and n.split("_")[-1] in "lbhsrm"
    ]
    aligned = [n for n in ("k", "v", "k_new", "v_new", "table", "inv_freq", *strides) if n not in absent]
    return Compilation(
        shape, kernel, signature, {**constants, **dict.fromkeys(absent)}, tiles.warps, aligned=aligned,
    )  # fmt: skip
