"""Slots and moves of a `collapse_`, brought to the device for the kernel: one small asynchronous copy.

Moves are executed one after the other, so that an entry may move twice and one slot may be read and written. What they
come to is a gather: each slot that changes gets the entry that some slot held before the first move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..splicing import expand_ranges

Ints = NDArray[np.int64]
Lists = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Staged:
    """table: int32 on the device: children [n, K], gists' slots [n, G], sources [s] and destinations [s] of the moves.
    chained: some slot is a source and a destination."""

    table: Tensor
    n_blocks: int
    n_moves: int
    chained: bool


def resolve_moves(moves: Ints) -> tuple[Ints, Ints, bool]:
    """(source, destination, count) [s, 3] executed in order -> sources, destinations (each once) of the gather that
    they come to, and whether the two share a slot."""
    moves = moves[moves[:, 2] > 0]
    source, destination, count = moves.T
    if not len(moves):
        return source, destination, False
    ends = destination + count
    if source.min() >= ends[-1] and bool((ends[:-1] <= destination[1:]).all()):  # as plans of the slots discipline are
        return expand_ranges(source, count), expand_ranges(destination, count), False
    low = min(source.min(), destination.min())
    before = np.arange(low, max((source + count).max(), ends.max()))
    after = before.copy()
    for from_, to, n in (moves - np.array((low, low, 0))).tolist():
        after[to : to + n] = after[from_ : from_ + n].copy()
    changed = np.flatnonzero(after != before)
    sources, destinations = after[changed], before[changed]
    return sources, destinations, bool(np.isin(sources, destinations).any())


def stage(children: Tensor, slots: Tensor, moves: Tensor, device: torch.device) -> Staged:
    """The arguments of `collapse_` (int64, on the CPU) on `device`, without waiting for it: the host memory is pinned,
    and torch keeps it until the copy is done. For a CUDA graph stage before the capture: a replay would copy again,
    from memory that is no longer ours."""
    sources, destinations, chained = resolve_moves(moves.numpy())
    parts: list[Lists] = [children.numpy().ravel(), slots.numpy().ravel(), sources, destinations]
    on_gpu = device.type == "cuda"
    table = torch.empty(sum(x.size for x in parts), dtype=torch.int32, pin_memory=on_gpu)
    np.concatenate(parts, out=table.numpy(), casting="same_kind")
    return Staged(table.to(device, non_blocking=True), children.shape[0], len(sources), chained)
